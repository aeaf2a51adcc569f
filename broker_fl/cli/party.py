"""`broker-fl party`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from broker_fl.config import Settings

app = typer.Typer(
    help="Enrol parties on the broker, through RabbitMQ's management API; the broker's URL needs an administrator's login.",
    no_args_is_help=True,
)

Name = Annotated[
    str, typer.Argument(help="Lower-case letters, digits, - and _; it becomes the party's login.", show_default=False)
]


@app.command("add")
def add(
    name: Name,
    config: options.Config = None,
    broker: options.Broker = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the enrolment; NAME.toml by default.", show_default=False)
    ] = None,
    sets: options.Sets = None,
) -> None:
    """Make a party, and write the file that its worker reads. It holds the password: hand it over safely."""
    settings = options.load(config, options.flags_of({"broker.url": broker}, sets))
    file = out or Path(f"{name}.toml")
    _refuse_to_overwrite(file)
    asyncio.run(_add(settings, name, file))
    typer.echo(f"party {name} is enrolled. Its worker: broker-fl worker --enrolment {file} --data PATH")


@app.command("list")
def list_all(config: options.Config = None, broker: options.Broker = None, sets: options.Sets = None) -> None:
    """Name all parties, one a line."""
    settings = options.load(config, options.flags_of({"broker.url": broker}, sets))
    for name in asyncio.run(_list(settings)):
        typer.echo(name)


@app.command("remove")
def remove(name: Name, config: options.Config = None, broker: options.Broker = None, sets: options.Sets = None) -> None:
    """Take a party's login away, which closes its connections, and delete its exchange and inbox."""
    settings = options.load(config, options.flags_of({"broker.url": broker}, sets))
    asyncio.run(_remove(settings, name))
    typer.echo(f"party {name} is removed")


def _refuse_to_overwrite(file: Path) -> None:
    """Before anything is made on the broker."""
    from broker_fl.errors import ConfigurationError

    if file.exists():
        raise ConfigurationError(f"{file} exists already: move it away first")


async def _add(settings: "Settings", name: str, file: Path) -> None:
    from broker_fl.enrolment import add_party, management_of, remove_party, write_enrolment
    from broker_fl.errors import ConfigurationError

    async with management_of(settings.broker) as management:
        password = await add_party(management, settings, name)
        try:
            write_enrolment(file, settings, name=name, password=password)
        except ConfigurationError:
            await remove_party(management, settings, name)
            raise


async def _list(settings: "Settings") -> list[str]:
    from broker_fl.enrolment import list_parties, management_of

    async with management_of(settings.broker) as management:
        return await list_parties(management, settings)


async def _remove(settings: "Settings", name: str) -> None:
    from broker_fl.enrolment import management_of, remove_party

    async with management_of(settings.broker) as management:
        await remove_party(management, settings, name)
