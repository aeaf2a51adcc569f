import asyncio
import fnmatch
import os
import re
import socket
import subprocess
import sys

import pytest
from deployment import DEPLOY, ROOT

from broker_fl.cli.metrics.endpoint import served
from broker_fl.cli.metrics.evaluator import EvaluatorMetrics
from broker_fl.config import load_settings

TEXT = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def _instructions() -> list[tuple[str, str]]:
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in whole.splitlines())]


def _of(name: str) -> list[str]:
    return [rest for word, rest in _instructions() if word == name]


def _is_sent(path: str) -> bool:
    """By .dockerignore, of which the last line that fits counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
                sent = line.startswith("!")
    return sent


def test_the_image_is_built_in_one_stage_and_runs_in_another():
    stages = _of("FROM")
    assert len(stages) == 2
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+( AS build)?", stage) for stage in stages)
    assert "PYTHON=3.13" in _of("ARG")
    final = _instructions()[max(index for index, (word, _) in enumerate(_instructions()) if word == "FROM") :]
    assert not any("pip" in rest or "apt" in rest for _, rest in final)


def test_it_runs_as_nobody_in_particular():
    assert _of("USER") == ["10001:10001"]
    assert not _of("ADD")


def test_no_host_and_no_secret_is_in_it():
    assert "://" not in TEXT
    for words in (*_of("ARG"), *_of("ENV")):
        assert not re.search(r"password|secret|token", words, re.IGNORECASE)


def test_torch_and_torchvision_come_together_by_our_pins_and_without_cuda():
    install, *_ = _of("RUN")[1:]
    assert "${TORCH_PIP_ARGS} -c constraints.txt torch torchvision" in install
    assert "torch.version.cuda" in install
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in pins} >= {"torch", "torchvision"}


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    sources = [source for rest in _of("COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "schemas", "broker_fl", "aggregator", "workers"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert _is_sent(source), source


@pytest.mark.parametrize("path", [".git", ".venv", "deploy/secrets/ca.pem", "deploy/.env", "tests", "build", "broker-fl-state"])
def test_nothing_else_is_sent(path):
    assert not _is_sent(path)


def test_its_settings_are_settings():
    pairs = [pair.split("=", 1) for words in _of("ENV") for pair in words.split()]
    environment = {name: value for name, value in pairs if name.startswith("BROKER_FL_")}
    settings = load_settings(environment=environment)
    assert (settings.metrics.host, settings.metrics.port, settings.metrics.evaluator_port) == ("0.0.0.0", 9464, 9465)  # noqa: S104
    assert str(settings.aggregator.state) == str(settings.worker.state) == "/var/lib/broker-fl"
    assert _of("EXPOSE") == ["9464 9465"]


def test_the_command_line_is_what_it_runs():
    assert _of("ENTRYPOINT") == ['["broker-fl"]']
    (check,) = _of("HEALTHCHECK")
    assert check.endswith('CMD ["python", "/opt/broker-fl/healthcheck.py"]')


def _is_well(**ports: int) -> bool:
    environment = {**os.environ, **{f"BROKER_FL_METRICS__{name}": str(port) for name, port in ports.items()}}
    ended = subprocess.run([sys.executable, DEPLOY / "healthcheck.py"], env=environment, capture_output=True, timeout=60)
    assert ended.stderr == b""
    return ended.returncode == 0


async def test_a_process_is_well_that_serves_its_figures_at_either_port():
    with socket.create_server(("127.0.0.1", 0)) as opened:
        closed = opened.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
    async with served(EvaluatorMetrics, host="127.0.0.1", port=port):
        assert await asyncio.to_thread(_is_well, PORT=closed, EVALUATOR_PORT=port)
        assert await asyncio.to_thread(_is_well, PORT=port)
        assert not await asyncio.to_thread(_is_well, PORT=closed)
    assert not await asyncio.to_thread(_is_well, PORT=port, EVALUATOR_PORT=port)
