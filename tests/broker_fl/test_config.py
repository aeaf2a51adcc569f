import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.certificates import Certificates
from broker_fl.cli.init import TEMPLATE
from broker_fl.config import SECTIONS, BrokerSettings, MergingSettings, Settings, TrainingSettings, load_settings
from broker_fl.errors import ConfigurationError
from schemas.frame import TrainingPlan


def _file(folder: Path, text: str, name: str = "federation.toml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def _loaded(*files: Path, flags: dict | None = None, **environment: str) -> Settings:
    return load_settings(*files, flags=flags, environment=environment)


def test_without_anything_the_defaults_hold():
    assert _loaded() == Settings()


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_default_is_a_value_that_may_be_given(section):
    defaults = SECTIONS[section]().model_dump()
    assert SECTIONS[section](**defaults) == SECTIONS[section]()


def test_the_environment_wins_over_the_file_and_flags_over_both(tmp_path):
    file = _file(tmp_path, "[merging]\nmixing_rate = 0.1\nhinge = 1\nbuffer_size = 2\nexponent = 0.1\n")
    loaded = _loaded(
        file,
        BROKER_FL_MERGING__MIXING_RATE="0.2",
        BROKER_FL_MERGING__HINGE="2",
        flags={"merging": {"mixing_rate": 0.3, "exponent": 0.3}},
    ).merging
    assert (loaded.mixing_rate, loaded.hinge, loaded.buffer_size, loaded.exponent) == (0.3, 2, 2, 0.3)
    assert loaded.max_staleness == MergingSettings().max_staleness


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_an_update_is_sent_again_after_some_time(seconds):
    assert Settings().worker.resend_after_s == 120.0
    assert _loaded(BROKER_FL_WORKER__RESEND_AFTER_S="0.5").worker.resend_after_s == 0.5
    with pytest.raises(ConfigurationError, match="resend_after_s"):
        _loaded(BROKER_FL_WORKER__RESEND_AFTER_S=seconds)


def test_the_url_of_a_ledger_is_a_secret():
    loaded = _loaded(BROKER_FL_AGGREGATOR__LEDGER="postgresql+psycopg://user:hidden@host/database")
    assert loaded.aggregator.ledger.get_secret_value() == "postgresql+psycopg://user:hidden@host/database"
    assert "hidden" not in f"{loaded!r} {loaded} {loaded.model_dump_json()}"
    assert Settings().aggregator.ledger is None


@pytest.mark.parametrize("name", ["BROKER_FL_RABBITMQ_SERVER", "BROKER_FL_POSTGRESQL_BIN", "BROKER_FL_FAILPOINTS"])
def test_variables_that_are_no_settings_are_no_mistakes(name):
    assert _loaded(**{name: "anything"}) == Settings()


def test_later_files_win_over_earlier_ones(tmp_path):
    first = _file(tmp_path, '[worker]\nparty = "a"\nthreads = 1\n[task]\nname = "npz"\n', "first.toml")
    second = _file(tmp_path, '[worker]\nparty = "b"\n', "second.toml")
    loaded = _loaded(first, second)
    assert (loaded.worker.party, loaded.worker.threads, loaded.task.name) == ("b", 1, "npz")


def test_a_flag_that_was_not_given_changes_nothing(tmp_path):
    file = _file(tmp_path, "[aggregator]\nversions = 7\n")
    assert _loaded(file, flags={"aggregator": {"versions": None, "seconds": None}, "task": {}}).aggregator.versions == 7


def test_the_environment_is_that_of_the_process_unless_another_is_given(monkeypatch):
    monkeypatch.setenv("BROKER_FL_MERGING__HINGE", "9")
    assert load_settings().merging.hinge == 9
    assert load_settings(environment={}).merging.hinge == MergingSettings().hinge


def test_other_variables_are_left_alone():
    assert _loaded(PATH="/bin", BROKER_FLX__A="1", broker_fl_merging__hinge="9", BROKER_FL_RABBITMQ_SERVER="/x") == Settings()


def test_lists_are_given_in_json_by_the_environment():
    loaded = _loaded(BROKER_FL_PARTITION__SIZES="[1, 2.5]", BROKER_FL_TASK__IMAGE_SHAPE="[3,32,32]")
    assert loaded.partition.sizes == (1.0, 2.5)
    assert loaded.task.image_shape == (3, 32, 32)


@pytest.mark.parametrize("text", ["[1, 2", "1, 2", "[]x", '["a"]', "[0]"])
def test_a_list_that_is_none_is_named(text):
    with pytest.raises(ConfigurationError, match=r"the environment: partition.sizes"):
        _loaded(BROKER_FL_PARTITION__SIZES=text)


def test_an_unknown_key_is_named_with_its_file_and_the_nearest_right_one(tmp_path):
    file = _file(tmp_path, "[merging]\nmixingrate = 0.5\n")
    with pytest.raises(
        ConfigurationError, match=r"federation.toml: unknown key 'mixingrate' in \[merging\]: did you mean 'mixing_rate'"
    ):
        _loaded(file)


def test_an_unknown_section_is_named_with_its_file_and_the_nearest_right_one(tmp_path):
    file = _file(tmp_path, "[merge]\nmixing_rate = 0.5\n")
    with pytest.raises(ConfigurationError, match=r"federation.toml: unknown section \[merge\]: did you mean 'merging'"):
        _loaded(file)


def test_an_unknown_key_among_the_flags_is_named():
    with pytest.raises(ConfigurationError, match=r"the flags: unknown key 'step' in \[training\]: did you mean 'steps'"):
        _loaded(flags={"training": {"step": 5}})


def test_an_unknown_key_in_the_environment_is_named():
    with pytest.raises(
        ConfigurationError, match=r"the environment: unknown key 'mixing' in \[merging\]: did you mean 'mixing_rate'"
    ):
        _loaded(BROKER_FL_MERGING__MIXING="1")


@pytest.mark.parametrize(
    "variable", ["BROKER_FL_MERGINGS__HINGE", "BROKER_FL_MERGING", "BROKER_FL_MERGING__", "BROKER_FL_MERGING_HINGE"]
)
def test_an_unknown_variable_is_named_with_the_nearest_right_one(variable):
    with pytest.raises(ConfigurationError, match=rf"unknown variable {variable}: did you mean 'BROKER_FL_MERGING__KEY'"):
        _loaded(**{variable: "1"})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("federation", "name", "Two Words"),
        ("worker", "party", "a.b"),
        ("worker", "share", "3/2"),
        ("worker", "share", "0/2"),
        ("worker", "share", "one/two"),
        ("worker", "throttle", 0.5),
        ("merging", "mixing_rate", 0),
        ("merging", "mixing_rate", 1.01),
        ("merging", "mixing_rate", float("nan")),
        ("merging", "exponent", 11),
        ("merging", "max_staleness", -1),
        ("merging", "strategy", "fedsgd"),
        ("aggregator", "fraction", 0),
        ("aggregator", "prefetch", 65_536),
        ("broker", "part_bytes", 1023),
        ("broker", "max_message_bytes", (512 << 20) + 1),
        ("task", "image_shape", [1, 28]),
        ("task", "seed", 2**63),
        ("training", "epochs", 0),
        ("codec", "keyframe", "topk:0.01+int8"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key(section, key, value):
    with pytest.raises(ConfigurationError, match=rf"the flags: {section}\.{key}") as caught:
        _loaded(flags={section: {key: value}})
    assert "\n" not in str(caught.value)


def test_what_one_origin_says_may_fit_only_together_with_another(tmp_path):
    federation = _file(tmp_path, "[broker]\nmax_message_bytes = 65536\npart_bytes = 32768\n")
    enrolment = _file(tmp_path, "[broker]\nmax_message_bytes = 131072\n", "a.toml")
    assert _loaded(federation, enrolment).broker.part_bytes == 32768
    assert _loaded(federation, flags={"broker": {"max_message_bytes": 70_000}}).broker.max_message_bytes == 70_000
    assert _loaded(federation, BROKER_FL_BROKER__PART_BYTES="65535").broker.part_bytes == 65535


def test_settings_that_do_not_fit_together_are_refused(tmp_path):
    file = _file(tmp_path, '[merging]\nmode = "mixing"\n')
    with pytest.raises(ConfigurationError, match="mode = 'mixing' goes with strategy = 'fedasync', not 'fedavg'"):
        _loaded(file, BROKER_FL_MERGING__STRATEGY="fedavg")
    with pytest.raises(ConfigurationError, match="part_bytes must be below max_message_bytes"):
        _loaded(flags={"broker": {"max_message_bytes": 1 << 20}})


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigurationError, match="`broker-fl init` writes"):
        _loaded(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[merging\n", b"a = \n", b"\xff\xfe[merging]", b"[merging]\nhinge = 1\nhinge = 2\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    file = tmp_path / "federation.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"federation.toml (is not TOML|cannot be read)"):
        _loaded(file)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        _loaded(tmp_path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(SECTIONS)) | st.text(max_size=5),
        st.dictionaries(
            st.text(max_size=8), st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers()), max_size=3
        )
        | st.integers()
        | st.lists(st.integers(), max_size=2),
        max_size=3,
    )
)
def test_any_flags_give_settings_or_a_configuration_error(flags):
    try:
        load_settings(flags=flags, environment={})
    except ConfigurationError:
        return


@pytest.mark.parametrize(
    ("url", "management", "user", "address"),
    [
        ("amqp://guest:guest@127.0.0.1:5672/", "http://guest:guest@127.0.0.1:15672", "guest", "127.0.0.1:5672"),
        ("amqp://a:b@broker.example.org:5699/vhost", "http://a:b@broker.example.org:15672", "a", "broker.example.org:5699"),
        ("amqps://a:b@broker.example.org", "https://a:b@broker.example.org:15671", "a", "broker.example.org:5671"),
        ("amqp://broker", "http://guest:guest@broker:15672", "guest", "broker:5672"),
        ("amqp://a:b@[::1]:5672/", "http://a:b@[::1]:15672", "a", "::1:5672"),
        ("amqp://a%40b:p%2Fw%40x@broker/%2F", "http://a%40b:p%2Fw%40x@broker:15672", "a@b", "broker:5672"),
    ],
)
def test_the_management_api_and_the_user_come_from_the_url(url, management, user, address):
    broker = BrokerSettings(url=url)
    assert broker.management().get_secret_value() == management
    assert broker.user() == user
    assert broker.address() == address


def test_a_management_url_that_is_given_is_taken():
    broker = BrokerSettings(management_url="http://c:d@other:1")
    assert broker.management().get_secret_value() == "http://c:d@other:1"


@pytest.mark.parametrize(
    "url",
    [
        "http://a:sesame@broker",
        "broker:5672",
        "",
        "amqp:",
        "amqp://",
        "amqp:///vhost",
        "amqp://a:sesame@",
        "amqp://a:sesame@broker:port/",
        "amqp://a:sesame@broker:99999/",
        "amqp://a:se#same@broker/",
        "amqp://a:se/same@broker/",
        "amqp://a:sesame@[::1/",
    ],
)
def test_a_url_that_cannot_be_is_refused_without_showing_it(url):
    with pytest.raises(ConfigurationError, match=r"broker.url: expected amqp://user:password@host:port/vhost") as caught:
        _loaded(flags={"broker": {"url": url}})
    assert "same" not in f"{caught.value} {caught.value.__cause__}"


def test_secrets_are_in_no_text(tmp_path):
    file = _file(tmp_path, '[broker]\nurl = "amqp://a:sesame@broker/"\nmanagement_url = "http://a:sesame@broker"\n')
    loaded = _loaded(file)
    texts = [repr(loaded), str(loaded), repr(loaded.broker.management()), loaded.broker.address(), loaded.model_dump_json()]
    assert not any("sesame" in text for text in texts)
    for wrong in ({"heartbeat_s": 0}, {"max_message_bytes": 1 << 20}, {"urls": "x"}):
        with pytest.raises(ConfigurationError) as caught:
            _loaded(file, flags={"broker": wrong})
        assert "sesame" not in f"{caught.value} {caught.value.__cause__}"


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Settings().merging.hinge = 5


def test_the_training_section_is_the_plan_that_rides_in_frames():
    loaded = _loaded(flags={"training": {"steps": "50", "learning_rate": 1}})
    assert loaded.training.plan() == TrainingPlan(steps=50, learning_rate=1.0)
    assert type(loaded.training.plan()) is TrainingPlan
    assert list(TrainingSettings.model_fields) == list(TrainingPlan.model_fields)


def test_an_exponent_leaves_every_weight_over_zero():
    (bounds,) = (info.metadata for name, info in MergingSettings.model_fields.items() if name == "exponent")
    most = max(bound.le for bound in bounds if hasattr(bound, "le"))
    assert (1.0 + 2**53) ** -most > 0


_COMMENTED = re.compile(r"^# (?=\[\w+\]|\w+ = )", re.MULTILINE)


def _commented_keys() -> list[tuple[str, str]]:
    active, every = tomllib.loads(TEMPLATE), tomllib.loads(_COMMENTED.sub("", TEMPLATE))
    return [(section, key) for section, keys in every.items() for key in keys if key not in active.get(section, {})]


def test_the_template_loads_as_it_is_written(tmp_path):
    assert _loaded(_file(tmp_path, TEMPLATE)).federation.name == "federation"


def test_the_template_loads_with_every_key_uncommented(tmp_path):
    text = _COMMENTED.sub("", TEMPLATE)
    assert len(_commented_keys()) > 15
    assert _loaded(_file(tmp_path, text)).merging.mode == "delta"


@pytest.mark.parametrize(("section", "key"), _commented_keys())
def test_a_key_that_is_commented_out_shows_its_default_if_it_has_one(section, key):
    shown = tomllib.loads(_COMMENTED.sub("", TEMPLATE))[section][key]
    default = getattr(SECTIONS[section](), key)
    assert default is None or shown == default


def test_the_management_url_that_the_template_shows_is_the_derived_one():
    shown = tomllib.loads(_COMMENTED.sub("", TEMPLATE))["broker"]["management_url"]
    assert shown == BrokerSettings().management().get_secret_value()


def test_the_choices_that_the_template_names_are_all_that_there_are():
    named = re.findall(r"^#? ?(\w+) = \"[^\"]*\" +# ((?:\w+ \| )+\w+)$", TEMPLATE, re.MULTILINE)
    choices = {key: set(line.split(" | ")) for key, line in named}
    assert choices["strategy"] == set(get_args(MergingSettings.model_fields["strategy"].annotation))
    assert choices["optimizer"] == set(get_args(TrainingPlan.model_fields["optimizer"].annotation))


@pytest.mark.parametrize("wrong", ["banana", "5 parsecs", ""])
def test_a_size_that_is_none_is_told_by_an_example(wrong):
    with pytest.raises(ConfigurationError, match=r"worker\.budget: expected a size, as in 20kB or 1MiB"):
        load_settings(flags={"worker": {"budget": wrong}}, environment={})


def test_sizes_are_read_with_their_units():
    settings = load_settings(flags={"worker": {"budget": "20kB"}, "codec": {"up_budget": "1MiB"}}, environment={})
    assert (settings.worker.budget, settings.codec.up_budget) == (20_000, 1 << 20)


def test_a_budget_does_not_go_with_a_warm_up():
    with pytest.raises(ConfigurationError, match="up_budget does not go with warm_up_versions"):
        load_settings(flags={"codec": {"up_budget": "20kB", "warm_up_versions": 10}}, environment={})


def test_a_keyframe_in_a_codec_that_nobody_can_round_by_is_named():
    with pytest.raises(ConfigurationError, match=r"codec\.keyframe: .*int8"):
        load_settings(flags={"codec": {"keyframe": "int4"}}, environment={})


# The broker over TLS


@pytest.fixture(scope="module")
def alice(tmp_path_factory) -> dict[str, str]:
    """`[broker]` of a party that logs in by certificate."""
    issued = Certificates.make(tmp_path_factory.mktemp("certs")).issue("alice")
    return {
        "url": "amqps://rabbit.example.org/hospitals",
        "certificate": issued.certificate_pem,
        "certificate_key": issued.key_pem.get_secret_value(),
    }


def test_a_certificate_without_a_password_is_the_login(alice):
    broker = _loaded(flags={"broker": alice}).broker
    assert broker.logs_in_by_certificate
    assert (broker.user(), broker.address()) == ("alice", "rabbit.example.org:5671")
    with_password = {**alice, "url": "amqps://bob:hidden@rabbit.example.org/hospitals"}
    broker = _loaded(flags={"broker": with_password}).broker
    assert not broker.logs_in_by_certificate
    assert broker.user() == "bob"


def test_a_certificate_may_be_a_path_or_a_text(alice, tmp_path):
    for key in ("certificate", "certificate_key"):
        _file(tmp_path, alice[key], key)
    named = {**alice, **{key: str(tmp_path / key) for key in ("certificate", "certificate_key")}}
    broker = _loaded(flags={"broker": named}).broker
    assert broker.user() == "alice"
    assert broker.pem("certificate_key") == alice["certificate_key"]
    assert broker.pem("ca") == ""


def test_a_text_in_pem_passes_through_toml_and_the_environment(alice, tmp_path):
    text = "[broker]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in alice.items())
    variables = {f"BROKER_FL_BROKER__{key.upper()}": value for key, value in alice.items()}
    assert _loaded(_file(tmp_path, text)).broker == _loaded(**variables).broker
    assert _loaded(**variables).broker.user() == "alice"


def test_the_key_of_a_certificate_is_a_secret(alice):
    loaded = _loaded(flags={"broker": alice})
    assert alice["certificate_key"].splitlines()[1] not in f"{loaded!r} {loaded} {loaded.model_dump_json()}"


def test_a_user_that_is_not_the_certificate_s_is_a_mistake(alice):
    broker = _loaded(flags={"broker": {**alice, "url": "amqps://bob@rabbit.example.org/"}}).broker
    with pytest.raises(ConfigurationError, match=r"url says user 'bob', and .* certificate is for 'alice'"):
        broker.user()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"certificate_key": None}, "certificate and certificate_key go together"),
        ({"certificate": None}, "certificate and certificate_key go together"),
        ({"url": "amqp://rabbit.example.org/"}, "a certificate goes with amqps://"),
    ],
)
def test_what_a_login_by_certificate_lacks_is_named(alice, given, expected):
    with pytest.raises(ConfigurationError, match=expected):
        _loaded(flags={"broker": {**alice, **given}})


def test_a_file_that_is_not_there_is_named_but_for_a_key(alice):
    broker = _loaded(flags={"broker": {**alice, "certificate": "nowhere.pem", "certificate_key": "c2VjcmV0"}}).broker
    with pytest.raises(ConfigurationError, match=r"\[broker\] certificate: 'nowhere.pem' cannot be read \(No such file"):
        broker.user()
    with pytest.raises(ConfigurationError, match=r"\[broker\] certificate_key: the file cannot be read") as caught:
        broker.pem("certificate_key")
    assert "c2VjcmV0" not in str(caught.value)


def test_management_is_https_where_the_broker_is_amqps():
    broker = _loaded(flags={"broker": {"url": "amqps://alice:a@rabbit.example.org:5999/x"}}).broker
    assert broker.management().get_secret_value() == "https://alice:a@rabbit.example.org:15671"


def test_management_asks_for_a_password_where_the_login_is_a_certificate(alice):
    with pytest.raises(ConfigurationError, match=r"management_url = https://USER:PASSWORD@rabbit\.example\.org:15671"):
        _loaded(flags={"broker": alice}).broker.management()
    given = {**alice, "management_url": "https://admin:a@console.example.org"}
    assert _loaded(flags={"broker": given}).broker.management().get_secret_value() == given["management_url"]
