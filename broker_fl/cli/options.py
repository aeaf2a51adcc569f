"""Flags that several commands share, and how flags become settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker_fl.cli.logs import LogFormat, LogLevel

if TYPE_CHECKING:
    from broker_fl.config import Settings

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The federation's settings, as `broker-fl init` writes them.", show_default=False),
]
Broker = Annotated[
    str | None, typer.Option("--broker", help="amqp://user:password@host:port/vhost; over [broker] url.", show_default=False)
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", help="digits, fashion_mnist, cifar10, npz, path/to/file.py:TASK or package.module:TASK.", show_default=False
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="small_cnn, tanh_cnn, federated_cnn, feature_cnn or linear, for built-in tasks.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None, typer.Option("--data", help="The data: a file or folder, as the task wants it.", show_default=False)
]
State = Annotated[Path | None, typer.Option("--state", help="The folder to keep state in.", show_default=False)]
Ledger = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="A database URL, postgresql+psycopg://..., where the ledger must survive its machine; else SQLite in --state.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default=False)]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", help="Serve what is counted to Prometheus, at /metrics of this port; 0: any.", show_default=False
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other setting: section.key=value, as in merging.mixing_rate=0.3. Repeatable.", show_default=False
    ),
]
Level = Annotated[LogLevel, typer.Option("--log-level", help="How much to say on standard error.")]
Format = Annotated[LogFormat, typer.Option("--log-format", help="For people, or one JSON object a line.")]

UntilStdinCloses = Annotated[bool, typer.Option(help="End with the process that started it.", hidden=True)]

Flags = dict[str, dict[str, Any]]


def flags_of(given: Mapping[str, object], sets: list[str] | None = None) -> Flags:
    """Nested settings from `section.key` names; None means not given. --set comes last."""
    from broker_fl.config import list_or_text

    flags: Flags = {}
    for name, value in given.items():
        section, _, key = name.partition(".")
        if value is not None:
            flags.setdefault(section, {})[key] = value
    for text in sets or []:
        name, equals, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and section and key):
            raise typer.BadParameter(f"expected section.key=value, not {text!r}", param_hint="--set")
        flags.setdefault(section.strip(), {})[key.strip()] = list_or_text(value.strip())
    return flags


def load(config: Path | None, flags: Flags, *more_files: Path | None) -> "Settings":
    """federation.toml in the current folder is read where no --config is given and it is there."""
    from broker_fl.config import load_settings

    default = Path("federation.toml")
    files = [config or (default if default.exists() else None), *more_files]
    return load_settings(*(file for file in files if file is not None), flags=flags)


def load_stores(config: Path | None, state: Path | None, ledger: str | None, sets: list[str] | None) -> "Settings":
    """For commands that need to know where an aggregator keeps what it has, and nothing else."""
    return load(config, flags_of({"aggregator.state": state, "aggregator.ledger": ledger}, sets))


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return json.dumps(list(value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def environment_of(flags: Flags) -> dict[str, str]:
    """The same flags as variables, for a child process: a command line is for everyone to see, an environment is not."""
    from broker_fl.config import ENVIRONMENT_PREFIX

    return {
        f"{ENVIRONMENT_PREFIX}{section}__{key}".upper(): _as_text(value)
        for section, keys in flags.items()
        for key, value in keys.items()
    }
