"""BROKER_FL_SECTION__KEY_FILE: as containers are given their secrets."""

import pytest

from broker_fl.config import load_settings
from broker_fl.errors import ConfigurationError

URL = "amqp://a:secret@host:5672/v"


def _loaded(**environment: str):
    return load_settings(environment={f"BROKER_FL_{name}": value for name, value in environment.items()})


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_file_holds_the_value_with_or_without_a_lines_end(tmp_path, end):
    file = tmp_path / "url"
    file.write_bytes((URL + end).encode())
    assert _loaded(BROKER__URL_FILE=str(file)).broker.url.get_secret_value() == URL


def test_a_file_may_hold_a_list(tmp_path):
    (tmp_path / "shape").write_text("[1, 28, 28]\n")
    assert _loaded(TASK__IMAGE_SHAPE_FILE=str(tmp_path / "shape")).task.image_shape == (1, 28, 28)


def test_the_variable_itself_wins(tmp_path):
    (tmp_path / "state").write_text("from-a-file")
    settings = _loaded(AGGREGATOR__STATE="given", AGGREGATOR__STATE_FILE=str(tmp_path / "state"))
    assert str(settings.aggregator.state) == "given"


def test_the_environment_wins_over_the_file_of_settings_this_way_too(tmp_path):
    (tmp_path / "f.toml").write_text('[federation]\nname = "below"\n')
    (tmp_path / "name").write_text("above")
    environment = {"BROKER_FL_FEDERATION__NAME_FILE": str(tmp_path / "name")}
    assert load_settings(tmp_path / "f.toml", environment=environment).federation.name == "above"


def test_a_file_that_is_not_there_is_named_with_its_variable(tmp_path):
    with pytest.raises(ConfigurationError, match=r"BROKER_FL_BROKER__URL_FILE: .*nowhere cannot be read"):
        _loaded(BROKER__URL_FILE=str(tmp_path / "nowhere"))


def test_a_value_in_a_file_that_is_wrong_is_not_shown(tmp_path):
    (tmp_path / "url").write_text("http://a:secret@host")
    with pytest.raises(ConfigurationError, match=r"the environment: broker.url") as caught:
        _loaded(BROKER__URL_FILE=str(tmp_path / "url"))
    assert "secret" not in str(caught.value)


def test_a_key_that_is_none_stays_a_mistake(tmp_path):
    (tmp_path / "x").write_text("1")
    with pytest.raises(ConfigurationError, match="unknown key 'urls_file'"):
        _loaded(BROKER__URLS_FILE=str(tmp_path / "x"))
