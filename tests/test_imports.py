"""What importing costs, and that folders in the current directory don't get in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("broker-fl")
OURS = ("workers", "schemas", "aggregator", "broker_fl")
HEAVY = ("torch", "torchvision", "numpy", "opacus", "sqlalchemy", "aio_pika", "pydantic", "sklearn")


def _run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Without what the environment of the tests adds to the path, and without its settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BROKER_FL_", "COVERAGE"))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def _loaded_by(statement: str, folder: Path) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    ended = _run(sys.executable, "-P", "-W", "error", "-c", code, folder=folder)
    assert ended.returncode == 0, ended.stderr
    return {name.partition(".")[0] for name in ended.stdout.split()}


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    assert not _loaded_by("import broker_fl", tmp_path) & set(HEAVY)


def test_importing_the_command_line_loads_no_torch(tmp_path):
    assert not _loaded_by("import broker_fl.cli.main", tmp_path) & {"torch", "torchvision", "opacus", "sklearn"}


def test_pure_rooms_load_nothing_that_reaches_outside(tmp_path):
    rooms = "schemas.update, schemas.frame, broker_fl.topology, broker_fl.codecs.codec, broker_fl.codecs.chain"
    more = "broker_fl.codecs.budget, aggregator.merging.strategies, aggregator.admission, workers.encoding, workers.participation"
    loaded = _loaded_by(f"import {rooms}, {more}", tmp_path)
    assert not loaded & {"torch", "aio_pika", "sqlalchemy", "httpx", "uvloop"}


@pytest.fixture
def folder_of_namesakes(tmp_path):
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('this is not our {name}')\n")
    return tmp_path


@pytest.mark.parametrize("start", [(SCRIPT,), (sys.executable, "-P", "-m", "broker_fl")], ids=["script", "module"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--version",), "broker-fl "),
        (("worker", "--party", "a", "--broker", "amqp://a@127.0.0.1", "--task", "unknown"), "error: there is no task 'unknown'"),
    ],
    ids=["version", "worker"],
)
def test_folders_of_the_same_names_in_the_current_directory_are_not_ours(folder_of_namesakes, start, arguments, said):
    if start == (SCRIPT,) and not SCRIPT.exists():
        pytest.skip("the broker-fl script is not installed")
    ended = _run(*start, *arguments, folder=folder_of_namesakes)
    assert said in ended.stdout + ended.stderr
    assert "this is not our" not in ended.stderr


def test_our_rooms_are_found_from_another_directory(folder_of_namesakes):
    statement = (
        "import workers, schemas, aggregator, broker_fl; print(*(m.__file__ for m in (workers, schemas, aggregator, broker_fl)))"
    )
    ended = _run(sys.executable, "-P", "-c", statement, folder=folder_of_namesakes)
    assert ended.returncode == 0, ended.stderr
    assert str(folder_of_namesakes) not in ended.stdout
