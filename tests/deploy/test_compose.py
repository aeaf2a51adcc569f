import re
from pathlib import PurePosixPath

import pytest
from deployment import DEPLOY, ROOT, document, parse_command

from broker_fl.config import load_settings
from broker_fl.keys import load_key

COMPOSE = document(DEPLOY / "compose.yaml")
SERVICES = COMPOSE["services"]
OURS = {name for name, service in SERVICES.items() if "build" in service}
EACH = pytest.mark.parametrize("name", SERVICES)
HOST = "broker.example.org"


def _filled(text: str) -> str:
    """As compose puts variables in, from .env.example."""
    return re.sub(r"\$\{BROKER_HOST[^}]*\}", HOST, text)


def _secrets(service) -> dict[str, str]:
    """Where each is in the container."""
    given = (entry if isinstance(entry, dict) else {"source": entry} for entry in service.get("secrets", ()))
    return {entry["source"]: entry.get("target", f"/run/secrets/{entry['source']}") for entry in given}


def _mounts(service) -> dict[str, str]:
    """What is at a path in the container."""
    parts = (volume.split(":") for volume in service.get("volumes", ()))
    return {target: source for source, target, *_ in parts}


@EACH
def test_a_service_has_no_more_rights_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode", "userns_mode"} & service.keys()
    user, _, _ = service["user"].partition(":")
    assert int(user) > 0


@EACH
def test_a_service_starts_again_and_has_its_limits(name):
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert {"mem_limit", "cpus", "pids_limit", "logging"} <= service.keys()


@EACH
def test_an_image_is_of_a_stated_version(name):
    image = SERVICES[name]["image"]
    default = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", image)
    _, _, tag = default.rpartition(":")
    assert re.match(r"v?\d+\.\d+", tag), image


@EACH
def test_a_service_says_whether_it_is_well(name):
    """Ours by the image."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    if name in OURS:
        assert "HEALTHCHECK" in dockerfile
        assert SERVICES[name]["build"] == {
            "context": "..",
            "dockerfile": "deploy/Dockerfile",
            "args": {"TORCH_PIP_ARGS": "${TORCH_PIP_ARGS:-}"},
        }
    else:
        check = SERVICES[name]["healthcheck"]
        assert check["test"][0] == "CMD"
        assert {"interval", "timeout", "retries", "start_period"} <= check.keys()


def test_only_the_brokers_tls_port_is_open_to_the_world():
    published = {(name, port) for name, service in SERVICES.items() for port in service.get("ports", ())}
    outside = {(name, port) for name, port in published if not port.startswith("127.0.0.1:")}
    assert outside == {("rabbitmq", "5671:5671")}


def test_what_is_published_is_in_a_network_that_can_be():
    """Docker publishes nothing of a container that is in internal networks alone."""
    internal = {name for name, network in COMPOSE["networks"].items() if (network or {}).get("internal")}
    for name, service in SERVICES.items():
        assert bool(set(service["networks"]) - internal) == bool(service.get("ports")), name


def test_each_reaches_those_whom_it_needs_and_nobody_else():
    members: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for network in service["networks"]:
            members.setdefault(network, set()).add(name)
    assert members == {
        "outside": {"rabbitmq"},
        "control": {"rabbitmq", "aggregator", "standby", "evaluator"},
        "ledger": {"postgres", "aggregator", "standby"},
        "watch": {"rabbitmq", "aggregator", "standby", "evaluator", "prometheus", "grafana"},
        "desk": {"prometheus", "grafana"},
    }
    assert members.keys() == COMPOSE["networks"].keys()


@EACH
def test_no_secret_is_written_here(name):
    for variable, value in SERVICES[name].get("environment", {}).items():
        is_secret = re.search(r"PASS|SECRET|TOKEN|KEY|_URL", variable) is not None
        if is_secret:
            is_named = variable.endswith("_FILE") or str(value).startswith("/run/secrets/")
            assert is_named or "@" not in str(value), variable
            assert is_named or not re.search(r"PASS|SECRET|TOKEN", variable), variable


def test_secrets_are_declared_used_and_made_by_the_script(secrets_folder):
    used = {secret for service in SERVICES.values() for secret in _secrets(service)}
    assert used == COMPOSE["secrets"].keys()
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert (secrets_folder / name).is_file(), name


def test_volumes_are_declared_and_used_and_mounted_files_exist(secrets_folder):
    sources = {source for service in SERVICES.values() for source in _mounts(service).values()}
    assert {source for source in sources if not source.startswith(".")} == COMPOSE["volumes"].keys()
    for source in sources:
        if source.startswith("./secrets/"):
            assert (secrets_folder / source.removeprefix("./secrets/")).exists(), source
        elif source.startswith("."):
            assert (DEPLOY / source).exists(), source


@EACH
def test_what_comes_from_this_folder_is_mounted_read_only(name):
    for volume in SERVICES[name].get("volumes", ()):
        assert not volume.startswith(".") or volume.endswith(":ro"), volume


@EACH
def test_a_service_waits_for_services_that_are_well(name):
    for other, condition in SERVICES[name].get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"}
        assert other in SERVICES


def test_the_standby_is_as_the_aggregator():
    assert SERVICES["standby"] == SERVICES["aggregator"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_commands_are_understood(name):
    parse_command(*SERVICES[name]["command"])


@pytest.mark.parametrize(("name", "user"), [("aggregator", "aggregator"), ("standby", "aggregator"), ("evaluator", "evaluator")])
def test_our_settings_load_from_what_is_mounted(secrets_folder, name, user):
    service = SERVICES[name]
    places = {place: str(secrets_folder / secret) for secret, place in _secrets(service).items()}
    environment = {variable: places.get(value, _filled(value)) for variable, value in service["environment"].items()}
    unknown = [value for value in environment.values() if value.startswith("/")]
    assert all(value.startswith(str(secrets_folder)) for value in unknown), unknown
    mounted = _mounts(service)
    file = PurePosixPath(service["command"][service["command"].index("--config") + 1])
    settings = load_settings(DEPLOY / mounted[str(file.parent)] / file.name, environment=environment)
    assert settings.broker.logs_in_by_certificate
    assert settings.broker.user() == user
    assert settings.broker.address() == f"{HOST}:5671"
    assert settings.broker.vhost() == "federation"
    if name == "evaluator":
        assert settings.aggregator.ledger is None
        assert settings.security.aggregator_key == load_key(secrets_folder / "federation.key").public
        return
    ledger = settings.aggregator.ledger.get_secret_value()
    password = (secrets_folder / "postgres_password").read_text()
    assert ledger == f"postgresql+psycopg://broker_fl:{password}@postgres/broker_fl"
    assert settings.broker.management().get_secret_value().endswith(f"@{HOST}:15671")
    assert settings.key_file == secrets_folder / "federation.key"


def test_the_name_that_parties_use_leads_to_the_broker_inside_too():
    aliases = SERVICES["rabbitmq"]["networks"]["control"]["aliases"]
    assert [_filled(alias) for alias in aliases] == [HOST]
    assert f"BROKER_HOST={HOST}" in (DEPLOY / ".env.example").read_text().splitlines()


def test_the_database_is_the_one_of_the_ledger(secrets_folder):
    environment = SERVICES["postgres"]["environment"]
    login = f"{environment['POSTGRES_USER']}:"
    url = (secrets_folder / "ledger_url").read_text().strip()
    assert url.startswith(f"postgresql+psycopg://{login}")
    assert url.endswith(f"@postgres/{environment['POSTGRES_DB']}")


def test_our_image_has_the_version_of_the_package():
    from broker_fl import __version__

    assert SERVICES["aggregator"]["image"] == f"${{BROKER_FL_IMAGE:-broker-fl:{__version__}}}"
    (image,) = document(DEPLOY / "kubernetes" / "kustomization.yaml")["images"]
    assert image["newTag"] == __version__
    assert (ROOT / "deploy" / ".env.example").read_text().count(f"broker-fl:{__version__}") == 1
