"""`broker-fl topology`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from broker_fl.config import Settings
    from broker_fl.definitions import Definitions, User

app = typer.Typer(
    help="Print what RabbitMQ can import, at its start (load_definitions) or later (POST /api/definitions).", no_args_is_help=True
)


@app.command("definitions")
def definitions(
    config: options.Config = None,
    broker: options.Broker = None,
    federation: Annotated[str | None, typer.Option("--federation", help="Over [federation] name.", show_default=False)] = None,
    model_bytes: Annotated[
        str | None,
        typer.Option("--model-bytes", help="Of one dense model, as in 64MiB; without it, the task's.", show_default=False),
    ] = None,
    aggregator: Annotated[
        str, typer.Option(help="The aggregator's user, which is the common name of its certificate.")
    ] = "aggregator",
    evaluator: Annotated[str, typer.Option(help="Likewise, the evaluator's.")] = "evaluator",
    sets: options.Sets = None,
) -> None:
    """Print a federation without parties: virtual host, exchanges, queues, bindings, policies, and the two users that serve it.

    There is no password in it: these users log in by certificate. What is there already on the broker is put in place of what it
    was (policies, permissions, users) or stays (exchanges, queues).
    """
    from broker_fl.definitions import federation_definitions
    from broker_fl.enrolment.parties import inbox_limits, vhost_limits

    settings = options.load(config, options.flags_of({"broker.url": broker, "federation.name": federation}, sets))
    size = _model_bytes(settings) if model_bytes is None else _bytes(model_bytes)
    _print(
        federation_definitions(
            settings.federation.name,
            vhost=settings.broker.vhost(),
            model_bytes=size,
            aggregator=aggregator,
            evaluator=evaluator,
            inbox=inbox_limits(settings),
            vhost_limits=vhost_limits(settings),
        )
    )


@app.command("logins")
def logins(
    files: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FILE...", help="Users, and the files that hold their passwords.", show_default=False),
    ],
    config: options.Config = None,
    broker: options.Broker = None,
    tags: Annotated[
        list[str] | None,
        typer.Option(
            "--tag",
            help="administrator (the default), monitoring, policymaker or management. Repeatable.",
            show_default=False,
        ),
    ] = None,
    sets: options.Sets = None,
) -> None:
    """Print users of the management API, with all permissions in the federation's virtual host. Their passwords are salted and
    hashed; keep the output from others all the same."""
    from broker_fl.definitions import login_definitions

    settings = options.load(config, options.flags_of({"broker.url": broker}, sets))
    given = tuple(tags or ("administrator",))
    _print(login_definitions([_login(text, given) for text in files], vhost=settings.broker.vhost()))


def _model_bytes(settings: "Settings") -> int:
    from broker_fl.cli.wiring import task_of
    from broker_fl.tasks.module import initial

    task = task_of(settings)
    _, manifest, _ = initial(task, settings.task.data, settings.task.seed, by_example=settings.privacy.is_asked_for)
    return 4 * manifest.size


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as exc:
        raise typer.BadParameter(f"expected a size, as in 64MiB, not {text!r}", param_hint="--model-bytes") from exc


def _login(text: str, tags: tuple[str, ...]) -> "User":
    import secrets

    from broker_fl.definitions import SALT_BYTES, User, password_hash
    from broker_fl.errors import ConfigurationError

    name, equals, file = text.partition("=")
    if not (equals and name and file):
        raise typer.BadParameter(f"expected NAME=FILE, not {text!r}", param_hint="NAME=FILE")
    try:
        password = Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"the password of {name!r}: {file} cannot be read: {exc}") from exc
    if not password:
        raise ConfigurationError(f"the password of {name!r}: {file} is empty")
    return User(name, password_hash(password, salt=secrets.token_bytes(SALT_BYTES)), tags)


def _print(found: "Definitions") -> None:
    typer.echo(json.dumps(found, indent=2))
