import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from broker_fl.privacy.accounting import composed, epsilon_of
from broker_fl.privacy.page import as_html
from broker_fl.privacy.record import Promise, Training
from broker_fl.privacy.report import as_json, report_of

DELTA = 1e-5
NASTY = """<script src="https://example.org/x.js">alert('&amp;')</script>"""


def _training(number=1, **given):
    given = {
        "at": 1_700_000_000.0 + 60 * number,
        "federation": "ward",
        "party": "ann",
        "outbox": "o" * 32,
        "ledger": "a" * 32,
        "base_version": number,
        "update_id": f"{number:032x}",
        "noise_multiplier": 1.0,
        "sample_rate": 1.0,
        "steps": 2,
        "max_grad_norm": 0.5,
        "num_examples": 12,
        "number": number,
        **given,
    }
    return Training(**given)


def _promise(*, limits=None, plan=None, **given):
    given = {"at": 1_700_000_000.0, "federation": "ward", "party": "ann", **given}
    return Promise(limits=json.dumps(limits or {"delta": DELTA, "accountant": "rdp"}), plan=json.dumps(plan or {}), **given)


def _report(trainings=(), promises=(), *, party="ann", record="r" * 32, delta=DELTA):
    return report_of(list(trainings), list(promises), party=party, record=record, delta=delta)


TRAININGS = [_training(number) for number in range(1, 4)]
MIXED = [*TRAININGS, _training(4, noise_multiplier=2.0, federation="cardio"), _training(5, noise_multiplier=3.0)]


class _Elements(HTMLParser):
    """What a browser would find: names of elements, their attributes, and the text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.names, self.attributes, self.open, self.unclosed, self.text, self.styles = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        while self.open and (last := self.open.pop()) != tag:
            self.unclosed.append(last)

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.text).append(data)


def _found(report):
    elements = _Elements()
    elements.feed(as_html(report))
    elements.close()
    return elements


def _text(report):
    return " ".join(_found(report).text)


def _points_drawn(page):
    """Of the staircase, as places in the drawing."""
    lines = re.findall(r'<polyline points="([^"]*)" fill="none" stroke="#1f6feb"', page)
    return [tuple(map(float, place.split(","))) for line in lines for place in line.split()]


def test_the_same_record_gives_the_same_bytes():
    first, second = (_report(list(MIXED), [_promise()]) for _ in range(2))
    assert as_html(first).encode() == as_html(second).encode()
    assert as_json(first).encode() == as_json(second).encode()


def test_json_says_what_the_accountants_say():
    found = json.loads(as_json(_report(TRAININGS)))
    history = composed(one.cost for one in TRAININGS)
    expected = {name: epsilon_of(history, delta=DELTA, accountant=name) for name in ("rdp", "prv", "gdp")}
    assert {cost["accountant"]: cost["epsilon"] for cost in found["costs"]} == expected
    assert found["costs_by_federation"] == {"ward": found["costs"]}
    for length, point in enumerate(found["rdp"], start=1):
        history = composed(one.cost for one in TRAININGS[:length])
        assert (point["number"], point["at"]) == (length, TRAININGS[length - 1].at)
        assert point["epsilon"] == epsilon_of(history, delta=DELTA, accountant="rdp")


def test_json_holds_every_training_and_promise_as_it_was_recorded():
    promise = _promise(limits={"delta": DELTA, "max_epsilon": 3.0})
    found = json.loads(as_json(_report(TRAININGS, [promise])))
    assert [Training(**one) for one in found["trainings"]] == TRAININGS
    assert [Promise(**one) for one in found["promises"]] == [promise]
    assert (found["party"], found["record"], found["delta"]) == ("ann", "r" * 32, DELTA)


def test_costs_are_said_for_each_federation_apart():
    report = _report(MIXED)
    assert list(report.costs_by_federation) == ["cardio", "ward"]
    cardio = report.costs_by_federation["cardio"][0]
    assert cardio.epsilon == epsilon_of({(2.0, 1.0): 2}, delta=DELTA, accountant="rdp")
    text = _text(report)
    assert "epsilon, cardio" in text
    assert f"{cardio.epsilon:.4f}" in text


def test_the_page_says_the_costs_and_what_each_training_brought_them_to():
    text = _text(_report(TRAININGS))
    for accountant in ("rdp", "prv", "gdp"):
        assert f"{epsilon_of({(1.0, 1.0): 6}, delta=DELTA, accountant=accountant):.4f}" in text
    for steps in (2, 4, 6):
        assert f"{epsilon_of({(1.0, 1.0): steps}, delta=DELTA, accountant='rdp'):.4f}" in text
    assert "3 trainings together cost epsilon at most" in text


def test_different_trainings_leave_gdp_without_an_answer_and_its_cell_says_why():
    report = _report(MIXED)
    gdp = report.costs[2]
    assert gdp.epsilon is None
    assert "gdp takes trainings of one kind only, and here are 3" in gdp.why
    assert gdp.why in _text(report)
    assert report.costs[1].epsilon is not None


@pytest.mark.parametrize("field", ["federation", "party", "update_id"])
def test_markup_in_a_training_is_text_in_the_page(field):
    _expect_no_markup(_report([_training(**{field: NASTY})], [_promise()]))


@pytest.mark.parametrize("field", ["federation", "party"])
def test_markup_in_a_promise_is_text_in_the_page(field):
    _expect_no_markup(_report(TRAININGS, [_promise(**{field: NASTY})]))


@pytest.mark.parametrize("field", ["limits", "plan"])
def test_markup_in_a_promised_setting_is_text_in_the_page(field):
    settings = {NASTY: NASTY, "delta": DELTA}
    report = _report(TRAININGS, [_promise(**{field: settings})])
    _expect_no_markup(report)
    assert NASTY in _text(report)


@pytest.mark.parametrize("field", ["party", "record"])
def test_markup_in_the_names_of_the_report_is_text_in_the_page(field):
    report = _report(TRAININGS, **{field: NASTY})
    _expect_no_markup(report)
    assert NASTY in _text(report)


@pytest.mark.parametrize("field", ["unit", "assumed", "not_covered"])
def test_markup_in_the_prose_is_text_in_the_page(field):
    value = NASTY if field == "unit" else (NASTY,)
    _expect_no_markup(replace(_report(TRAININGS), **{field: value}))


def _expect_no_markup(report):
    expected = _found(_report(TRAININGS, [_promise()]))
    found = _found(report)
    assert set(found.names) <= set(expected.names)
    assert {name for name, _ in found.attributes} <= {name for name, _ in expected.attributes}
    assert NASTY not in as_html(report)


def test_the_page_has_no_script_and_needs_nothing_from_elsewhere():
    found = _found(_report(MIXED, [_promise(limits={"delta": DELTA, "max_epsilon": 99.0})]))
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a", "image", "use"} & set(found.names)
    assert not {name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href", "xlink:href", "style")}
    style = "".join(found.styles)
    assert style
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in as_html(_report(MIXED))


def test_elements_of_the_page_are_closed():
    found = _found(_report(MIXED, [_promise(limits={"delta": DELTA, "max_epsilon": 9.0}, plan={"noise_multiplier": 1.0})]))
    assert (found.open, found.unclosed) == ([], [])


def test_an_empty_record_has_a_report():
    report = _report()
    assert [cost.epsilon for cost in report.costs] == [0.0, 0.0, 0.0]
    text = _text(report)
    assert "Nothing was spent: no training is recorded." in text
    assert "Nothing to draw." in text
    assert "Each training (0)" in text
    assert json.loads(as_json(report))["trainings"] == []


def test_a_single_training_is_drawn_inside_of_the_frame():
    page = as_html(_report(TRAININGS[:1]))
    places = _points_drawn(page)
    assert places
    assert all(0 <= x <= 760 and 0 <= y <= 300 for x, y in places)
    assert "nan" not in page


@pytest.mark.parametrize("times", [[5.0, 5.0, 5.0], [100.0, 50.0, 400.0], [300.0, 200.0, 100.0]])
def test_trainings_at_one_instant_or_by_a_clock_that_was_set_back_stay_in_the_frame(times):
    trainings = [replace(one, at=at) for one, at in zip(TRAININGS, times, strict=True)]
    places = _points_drawn(as_html(_report(trainings)))
    assert len(places) == 2 + 2 * 2
    assert all(60 <= x <= 740 and 20 <= y <= 250 for x, y in places)


def test_the_staircase_never_falls():
    heights = [y for _, y in _points_drawn(as_html(_report(MIXED)))]
    assert heights == sorted(heights, reverse=True)


def test_a_record_that_costs_nothing_at_a_large_delta_is_drawn_all_the_same():
    report = _report([_training(noise_multiplier=50.0)], delta=0.5)
    assert report.costs[0].epsilon == 0.0
    assert _points_drawn(as_html(report))


def test_a_diverged_training_is_shown_and_counted():
    report = _report([_training(1), _training(2, update_id=None)])
    assert _text(report).count("diverged, not sent") == 1
    assert report.costs[0].epsilon == epsilon_of({(1.0, 1.0): 4}, delta=DELTA, accountant="rdp")
    assert json.loads(as_json(report))["trainings"][1]["update_id"] is None


def test_next_to_no_noise_is_said_in_words_since_json_has_no_infinity():
    report = _report([_training(noise_multiplier=1e-200)])
    assert [cost.epsilon for cost in report.costs] == [None, None, None]
    assert report.costs[0].why == "no bound: there was next to no noise"
    assert json.loads(as_json(report))["rdp"] == []
    assert "no bound: there was next to no noise" in _text(report)


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 40])
def test_prv_is_asked_for_at_most_12_trainings_the_first_and_the_last_among_them(count):
    trainings = [_training(number, steps=1) for number in range(1, count + 1)]
    numbers = [point.number for point in _report(trainings).prv]
    assert len(numbers) == min(12, count)
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (1, count)


def test_the_points_of_prv_are_drawn():
    report = _report(TRAININGS)
    assert [point.epsilon for point in report.prv] == [
        epsilon_of({(1.0, 1.0): steps}, delta=DELTA, accountant="prv") for steps in (2, 4, 6)
    ]
    assert _found(report).names.count("circle") == 3


def test_the_limit_is_drawn_at_the_partys_own_delta_only():
    promises = [_promise(limits={"delta": DELTA, "max_epsilon": 99.5})]
    assert "limit 99.5" in _text(_report(TRAININGS, promises))
    assert "limit 99.5" not in _text(_report(TRAININGS, promises, delta=1e-6))


def test_the_limit_is_the_partys_last_one():
    promises = [
        _promise(limits={"delta": DELTA, "max_epsilon": 99.5}),
        _promise(limits={"delta": DELTA, "max_epsilon": 55.5}),
        _promise(limits={"delta": DELTA, "max_epsilon": 11.5}, party="bob"),
    ]
    text = _text(_report(TRAININGS, promises))
    assert "limit 55.5" in text
    assert "limit 99.5" not in text
    assert "limit 11.5" not in text


@pytest.mark.parametrize("limits", [{"delta": DELTA}, {"accountant": "rdp"}])
def test_without_a_limit_there_is_no_line(limits):
    assert "stroke-dasharray" not in as_html(_report(TRAININGS, [_promise(limits=limits)]))


def test_delta_is_the_given_one_or_that_of_the_partys_last_limits_or_one_in_100_000():
    promises = [_promise(limits={"delta": 1e-3}), _promise(limits={"delta": 1e-7}), _promise(limits={"delta": 0.5}, party="bob")]
    assert _report(TRAININGS, promises, delta=1e-4).delta == 1e-4
    assert _report(TRAININGS, promises, delta=None).delta == 1e-7
    assert _report(TRAININGS, [], delta=None).delta == 1e-5
    assert _report(TRAININGS, promises[2:], delta=None).delta == 1e-5


def test_the_unit_what_is_assumed_and_what_is_not_covered_are_in_the_page():
    report = _report(TRAININGS)
    text = _text(report)
    assert report.unit[1:] in text
    assert report.assumed
    assert report.not_covered
    assert all(one in text for one in (*report.assumed, *report.not_covered))
