"""A privacy report as one HTML page that needs nothing else: no script, no font, no network. Pure."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise

from broker_fl.privacy.accounting import Accountant
from broker_fl.privacy.record import Promise, Training
from broker_fl.privacy.report import Cost, Report

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 20, 50
_TICKS = 5

_ABOUT: dict[Accountant, str] = {
    "rdp": "an upper bound, also where later trainings were chosen by what earlier ones showed",
    "prv": "an upper bound, numerically composed, usually a tenth lower",
    "gdp": "an approximation, which may be too low; for trainings of one kind only",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #d9dee3; }
th { text-align: left; background: #f3f5f7; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.headline { font-size: 1.2rem; padding: .8rem 1rem; background: #eef4fb; border-left: 4px solid #1f6feb; }
.trainings { max-height: 30rem; overflow: auto; } code { font-size: 12px; } .muted { color: #57606a; }
@media print { .trainings { max-height: none; } }
"""


def as_html(report: Report) -> str:
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Privacy report of party {escape(report.party)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Privacy report of party {escape(report.party)}</h1>",
        _headline(report),
        "<h2>What it cost, by each accountant</h2>",
        _costs(report),
        "<h2>Epsilon over time</h2>",
        _plot(report),
        "<h2>What was promised</h2>",
        _promises(report.promises),
        "<h2>Unit of protection</h2>",
        f"<p>{escape(report.unit[:1].upper() + report.unit[1:])}.</p>",
        "<h2>What is assumed</h2>",
        _list(report.assumed),
        "<h2>What is not covered</h2>",
        _list(report.not_covered),
        f"<h2>Each training ({len(report.trainings)})</h2>",
        _trainings(report),
        f'<p class="muted">Made from the privacy record <code>{escape(report.record)}</code> alone: made again, it is the same.',
        "</p></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _headline(report: Report) -> str:
    cost = report.costs[0]
    if not report.trainings:
        text = "Nothing was spent: no training is recorded."
    else:
        text = (
            f"{len(report.trainings)} trainings together cost epsilon at most <b>{_number(cost.epsilon)}</b> at delta "
            f"{report.delta:g} for each example (accountant {cost.accountant})."
        )
    return f'<p class="headline">{text}</p>'


def _costs(report: Report) -> str:
    columns = ["all", *report.costs_by_federation]
    rows = []
    for position, cost in enumerate(report.costs):
        values = [report.costs, *report.costs_by_federation.values()]
        cells = "".join(f'<td class="n">{_cost(one[position])}</td>' for one in values)
        rows.append(f"<tr><td>{cost.accountant}</td><td>{escape(_ABOUT[cost.accountant])}</td>{cells}</tr>")
    heads = "".join(f'<th class="n">epsilon, {escape(name)}</th>' for name in columns)
    return f"<table><tr><th>accountant</th><th>what it is</th>{heads}</tr>{''.join(rows)}</table>"


def _cost(cost: Cost) -> str:
    return _number(cost.epsilon) if cost.epsilon is not None else f'<span class="muted">{escape(cost.why)}</span>'


def _promises(promises: Sequence[Promise]) -> str:
    if not promises:
        return "<p>Nothing yet.</p>"
    rows = [
        f"<tr><td>{_time(one.at)}</td><td>{escape(one.federation)}</td><td>{escape(one.party)}</td>"
        f"<td>{_settings(one.limits)}</td><td>{_settings(one.plan)}</td></tr>"
        for one in promises
    ]
    heads = "<tr><th>since</th><th>federation</th><th>party</th><th>the party allows</th><th>the federation asks for</th></tr>"
    return f"<table>{heads}{''.join(rows)}</table>"


def _settings(text: str) -> str:
    return "<br>".join(escape(f"{key} = {value}") for key, value in json.loads(text).items())


def _trainings(report: Report) -> str:
    by_number = {point.number: point.epsilon for point in report.rdp}
    rows = [_training(position, one, by_number.get(position)) for position, one in enumerate(report.trainings, start=1)]
    names = ("", "noise multiplier", "sample rate", "steps", "clipping norm", "examples", "epsilon after it (rdp)")
    heads = "".join(f'<th class="n">{name}</th>' for name in names[1:])
    first = '<th class="n">#</th><th>at</th><th>federation</th><th>party</th><th class="n">from version</th><th>update</th>'
    return f'<div class="trainings"><table><tr>{first}{heads}</tr>{"".join(rows)}</table></div>'


def _training(number: int, one: Training, epsilon: float | None) -> str:
    update = "diverged, not sent" if one.update_id is None else escape(one.update_id[:8])
    facts = (f"{one.noise_multiplier:.4g}", f"{one.sample_rate:.4g}", one.steps, f"{one.max_grad_norm:g}", one.num_examples)
    cells = "".join(f'<td class="n">{escape(str(fact))}</td>' for fact in (*facts, _number(epsilon)))
    return (
        f'<tr><td class="n">{number}</td><td>{_time(one.at)}</td><td>{escape(one.federation)}</td><td>{escape(one.party)}</td>'
        f'<td class="n">{one.base_version}</td><td><code>{update}</code></td>{cells}</tr>'
    )


def _plot(report: Report) -> str:
    """Steps over time: the record knows of nothing in between."""
    points = report.rdp
    if not points:
        return "<p>Nothing to draw.</p>"
    limit = _limit(report)
    times = [point.at for point in points]
    # A clock that was set back: the record keeps the order, and the plot its frame.
    first, last = min(times), max(*times, min(times) + 1.0)
    top = 1.05 * max([point.epsilon for point in (*points, *report.prv)] + ([limit] if limit else [])) or 1.0

    def place(at: float, epsilon: float) -> tuple[float, float]:
        across = _LEFT + (at - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - epsilon / top * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_axes(first, last, top)]
    if limit:
        _, height = place(first, limit)
        drawn.append(_line([(_LEFT, height), (_WIDTH - _RIGHT, height)], "#cf222e", dash="6 4"))
        drawn.append(f'<text x="{_LEFT + 6}" y="{height + 13:.1f}" fill="#cf222e">limit {limit:g}</text>')
    drawn.append(_line(_staircase([place(point.at, point.epsilon) for point in points]), "#1f6feb"))
    drawn += [_dot(*place(point.at, point.epsilon)) for point in report.prv]
    height = _HEIGHT - 8
    legend = (
        f'<text x="{_LEFT + 200}" y="{height}" fill="#1f6feb">— rdp, after each training</text>'
        f'<text x="{_LEFT + 380}" y="{height}" fill="#8250df">● prv, after some of them</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="epsilon over time" '
        f'font-family="sans-serif" font-size="11">{"".join(drawn)}{legend}</svg>'
    )


def _limit(report: Report) -> float | None:
    """The party's own, as it is now, at the report's delta."""
    limits = [json.loads(one.limits) for one in report.promises if one.party == report.party]
    if not limits or limits[-1].get("delta") != report.delta:
        return None
    found = limits[-1].get("max_epsilon")
    return None if found is None else float(found)


def _axes(first: float, last: float, top: float) -> str:
    bottom = _HEIGHT - _BOTTOM
    drawn = [_line([(_LEFT, _TOP), (_LEFT, bottom), (_WIDTH - _RIGHT, bottom)], "#57606a")]
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        height = bottom - share * (_HEIGHT - _TOP - _BOTTOM)
        drawn.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{top * share:.3g}</text>')
        drawn.append(_line([(_LEFT, height), (_WIDTH - _RIGHT, height)], "#eaeef2"))
    anchors = ((first, _LEFT, "start"), (last, _WIDTH - _RIGHT, "end"))
    drawn += [f'<text x="{x}" y="{bottom + 18}" text-anchor="{anchor}">{_time(at)}</text>' for at, x, anchor in anchors]
    drawn.append(f'<text x="14" y="{_TOP - 6}">epsilon</text>')
    return "".join(drawn)


def _staircase(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    steps = [(places[0][0], float(_HEIGHT - _BOTTOM)), places[0]]
    for (_, before), (across, height) in pairwise(places):
        steps += [(across, before), (across, height)]
    return steps


def _line(places: Iterable[tuple[float, float]], colour: str, *, dash: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#8250df"/>'


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
