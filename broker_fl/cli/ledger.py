"""`broker-fl ledger`."""

from typing import TYPE_CHECKING

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from broker_fl.config import Settings

app = typer.Typer(help="Look into the aggregator's ledger.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """With one command only, typer would drop the name `verify`."""


@app.command("verify")
def verify(config: options.Config = None, state: options.State = None, sets: options.Sets = None) -> None:
    """Make every version again from the first snapshot and compare with what was broadcast and kept, to the last bit."""
    settings = options.load(config, options.flags_of({"aggregator.state": state}, sets))
    _verify(settings)


def _verify(settings: "Settings") -> None:
    from aggregator.ledger import open_ledger_for_reading
    from aggregator.recovery import manifest_of_ledger
    from aggregator.verification import verify
    from broker_fl.cli.wiring import ledger_file, snapshots_of

    file = ledger_file(settings)
    with open_ledger_for_reading(file) as ledger:
        found = verify(ledger, snapshots_of(settings, manifest_of_ledger(ledger)))
    typer.echo(
        f"{file}: {found.entries} entries ({found.merged} merged, {found.buffered} buffered, {found.refused} refused), "
        f"{found.frames} frames, {found.snapshots} snapshots: all as recorded"
    )
    typer.echo(f"version {found.version} is {found.model_digest}")
