"""What [privacy] comes to, and what of it cannot be: each mistake is told before anything is opened."""

import pytest
from typer.testing import CliRunner

from broker_fl.cli.main import app
from broker_fl.cli.wiring import built_aggregator
from broker_fl.config import load_settings
from broker_fl.errors import ConfigurationError

NOISE = {"mechanism": "dp-sgd", "noise_multiplier": 1.0}


def load(**sections):
    return load_settings(flags={"security": {"signatures": False}, **sections}, environment={})


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"mechanism": "dp-sgd"}, "needs either noise_multiplier, or target_epsilon with planned_trainings"),
        ({**NOISE, "target_epsilon": 3.0}, "needs either noise_multiplier, or target_epsilon with planned_trainings"),
        ({"mechanism": "dp-sgd", "target_epsilon": 3.0}, "target_epsilon and planned_trainings go together"),
        ({**NOISE, "planned_trainings": 3}, "target_epsilon and planned_trainings go together"),
    ],
)
def test_a_plan_that_does_not_say_how_much_noise_is_refused(privacy, said, tmp_path):
    settings = load(privacy=privacy, aggregator={"state": tmp_path})
    with pytest.raises(ConfigurationError, match=said), built_aggregator(settings, None):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["topk:0.01+int4", "topk-per-tensor:0.1+int8", "threshold:0.01+int8"])
def test_codecs_that_select_the_largest_noise_are_refused_unless_they_are_asked_for(codec, tmp_path):
    asked = {"codec": {"up": codec}, "aggregator": {"state": tmp_path}}
    with (
        pytest.raises(ConfigurationError, match="those are the largest noise: take a quantizer alone"),
        built_aggregator(load(privacy=NOISE, **asked), None),
    ):
        pass
    with built_aggregator(load(privacy={**NOISE, "allow_topk": True}, **asked), None) as built:
        assert built.manifest.size


@pytest.mark.parametrize("codec", [None, "int8", "float32", "eden:1", "randomk:0.1+int8"])
def test_codecs_that_do_not_look_at_the_values_are_taken(codec, tmp_path):
    settings = load(privacy=NOISE, codec={"up": codec}, aggregator={"state": tmp_path})
    with built_aggregator(settings, None):
        assert settings.update_codec == codec or (codec is None and settings.update_codec == "eden:2")


def test_without_privacy_the_codec_is_sparse():
    assert load().update_codec == "topk:0.01+int4"
    assert load(privacy=NOISE, codec={"up": "topk:0.1+int8"}).update_codec == "topk:0.1+int8"


@pytest.mark.parametrize(
    ("merging", "said"),
    [
        ({"strategy": "fedbuff", "noise_multiplier": 1.0}, "needs a clip_norm"),
        ({"clip_norm": 1.0}, "goes with a buffer"),
        ({"strategy": "fedbuff", "clip_norm": -1.0}, "greater than 0"),
    ],
)
def test_client_level_noise_that_covers_nothing_is_refused(merging, said):
    with pytest.raises(ConfigurationError, match=said):
        load(merging=merging)


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"delta": 0.0}, "privacy.delta: .*greater than 0"),
        ({"delta": 1.0}, "privacy.delta: .*less than 1"),
        ({"max_epsilon": 0.0}, "privacy.max_epsilon: .*greater than 0"),
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier: .*greater than or equal to 0.01"),
        ({"accountant": "gdp", "max_epsilon": 3.0}, "may say too little, and is no bound"),
        ({"accountant": "rpd"}, "'rdp', 'prv' or 'gdp'"),
        ({"mechanism": "dp"}, "'none' or 'dp-sgd'"),
        ({"max_epsilom": 1.0}, "did you mean 'max_epsilon'"),
    ],
)
def test_values_that_cannot_be_are_named(privacy, said):
    with pytest.raises(ConfigurationError, match=said):
        load(privacy=privacy)


def test_in_a_partys_own_file_a_noise_is_the_least_and_a_target_the_most():
    own = load(privacy={"noise_multiplier": 2.0, "min_noise_multiplier": 1.0, "target_epsilon": 3.0}).privacy
    assert (own.least_noise, own.most_epsilon) == (2.0, 3.0)
    assert load(privacy={"target_epsilon": 3.0, "max_epsilon": 8.0}).privacy.most_epsilon == 8.0
    assert (load().privacy.least_noise, load().privacy.most_epsilon, load().privacy.plan()) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "whose privacy\\? name the party by --party NAME"),
        (("--party", "a"), "there is no privacy record"),
        (("--party", "a", "--delta", "2"), "expected a number between 0 and 1"),
        (("--party", "a", "--out", "report.pdf"), "ends in .html or .json"),
    ],
)
def test_a_report_that_cannot_be_made_says_why(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["privacy", "report", *arguments])
    assert isinstance(result.exception, ConfigurationError)
    with pytest.raises(ConfigurationError, match=said):
        raise result.exception
