"""`broker-fl`: the commands, and how errors leave the process."""

import os
from typing import Annotated

import typer

from broker_fl import __version__
from broker_fl.cli import aggregator, certs, demo, evaluator, init, ledger, model, party, privacy, status, topology, worker

app = typer.Typer(
    name="broker-fl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's tables cut long words off in narrow terminals, and its markup takes [broker] for a style.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("init")(init.command)
app.command("aggregator")(aggregator.command)
app.command("worker")(worker.command)
app.command("evaluator")(evaluator.command)
app.add_typer(party.app, name="party")
app.add_typer(certs.app, name="certs")
app.command("status")(status.command)
app.add_typer(ledger.app, name="ledger")
app.add_typer(model.app, name="model")
app.add_typer(privacy.app, name="privacy")
app.add_typer(topology.app, name="topology")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"broker-fl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Federated learning over RabbitMQ: parties train on data that never leaves them, and come online when they can."""


def _arm_failpoints() -> None:
    """For tests of what happens when a process ends at a moment that no signal can be timed for."""
    if armed := os.environ.get("BROKER_FL_FAILPOINTS"):
        from broker_fl.failpoints import arm

        arm(armed)
        typer.echo(f"failpoints are armed, this is a test: {armed}", err=True)


def main() -> None:
    """What can be expected to go wrong is one line on standard error and exit code 2; anything else is a bug and a traceback."""
    try:
        _arm_failpoints()
        app()
    except Exception as exc:
        from broker_fl.errors import BrokerFLError, first_of

        error = first_of(exc)
        if not isinstance(error, BrokerFLError):
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
