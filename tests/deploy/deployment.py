"""deploy/ as the tests read it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

from broker_fl.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

METRIC = re.compile(r"\b(?:broker_fl|rabbitmq)_[a-z0-9_]+")
"""In a query; labels of ours begin otherwise."""
LABELS = frozenset({"rabbitmq_node", "rabbitmq_cluster"})


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def document(file: Path) -> Any:
    (only,) = documents(file)
    return only


def metrics_in(expression: str) -> set[str]:
    return set(METRIC.findall(expression)) - LABELS


def parse_command(*words: str) -> None:
    """As the command line would, without running it. Raises KeyError for an unknown command, click's UsageError."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


def settings_of_conf(text: str) -> dict[str, str]:
    """rabbitmq.conf's keys."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pairs = [line.split("=", 1) for line in lines]
    found = {key.strip(): value.strip() for key, value in pairs}
    assert len(found) == len(pairs), "a key is there twice"
    return found


def shell_blocks(text: str) -> list[list[str]]:
    """The commands of a document's ```sh blocks, as words, without comments; a line that ends in \\ goes on."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


def make_secrets(folder: Path, *hosts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a copy of the script, since it writes beside itself."""
    shutil.copy(DEPLOY / "make_secrets.sh", folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_FL_")}
    environment = {**kept, "BROKER_FL": f"{sys.executable} -P -m broker_fl", **variables}
    return subprocess.run(
        ["sh", folder / "make_secrets.sh", *hosts], env=environment, cwd="/", capture_output=True, text=True, timeout=100
    )
