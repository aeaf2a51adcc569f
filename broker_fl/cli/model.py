"""`broker-fl model`: looking back at versions, and going back to one."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from aggregator.history import Version
    from aggregator.ledger import Ledger
    from aggregator.merging.fold import State

app = typer.Typer(help="Look back at the model's versions, and go back to one.", no_args_is_help=True)

Out = Annotated[Path | None, typer.Option(help="The safetensors file to write.", show_default=False)]


@app.command("list")
def list_versions(
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All of them, one JSON object a line.")] = False,
    sets: options.Sets = None,
) -> None:
    """List the versions that were broadcast, kept as a snapshot, or made by a rollback. All others can be exported too."""
    from aggregator.history import versions
    from broker_fl.cli.stores import stores_for_reading

    with stores_for_reading(options.load_stores(config, state, ledger, sets)) as (found, _):
        listed = versions(found)
    if as_json:
        for version in listed:
            typer.echo(json.dumps(asdict(version)))
    else:
        _show(listed, last=last)


def _show(listed: "list[Version]", *, last: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("version")
    table.add_column("at (UTC)", no_wrap=True)
    for column in ("frame", "its digest", "snapshot", "remarks"):
        table.add_column(column)
    for version in listed[-last:]:
        gone = "rolled back" if version.is_rolled_back else ""
        back = "" if version.goes_back_to is None else f"back to {version.goes_back_to}"
        table.add_row(
            str(version.version),
            datetime.fromtimestamp(version.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "" if version.frame is None else str(version.frame),
            version.digest[:12],
            "yes" if version.snapshot else "",
            ", ".join(filter(None, (back, gone))),
        )
    Console().print(table)
    if len(listed) > last:
        typer.echo(f"and {len(listed) - last} before them: --last {len(listed)} shows all")


@app.command("export")
def export(
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    version: Annotated[int | None, typer.Option(min=0, help="Which version; the newest without.", show_default=False)] = None,
    out: Out = None,
    sets: options.Sets = None,
) -> None:
    """Make a version again, to the last bit, and write it as a safetensors file."""
    from aggregator.history import model_of
    from broker_fl.cli.stores import stores_for_reading

    with stores_for_reading(options.load_stores(config, state, ledger, sets)) as (found, snapshots):
        made = model_of(found, snapshots, version=version)
        _write(found, made, out or Path(f"model-v{made.version}.safetensors"))


@app.command("replay")
def replay(
    without: Annotated[str, typer.Option(help="The party to leave out.")],
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    out: Out = None,
    sets: options.Sets = None,
) -> None:
    """Make the newest version as if a party had never taken part: its updates left out, all others merged as they were."""
    from aggregator.history import without as replay_without
    from broker_fl.cli.stores import stores_for_reading

    with stores_for_reading(options.load_stores(config, state, ledger, sets)) as (found, snapshots):
        made = replay_without(found, snapshots, party=without)
        _write(found, made, out or Path(f"model-v{made.version}-without-{without}.safetensors"), without=without)


@app.command("rollback")
def rollback(
    to: Annotated[int, typer.Option(min=0, help="The version whose model is to go on.")],
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    sets: options.Sets = None,
) -> None:
    """Make a new version of an earlier one's model. An aggregator at work goes on from it, and sends it to all workers."""
    from aggregator.history import roll_back
    from broker_fl.cli.stores import holder, stores_for_writing

    with stores_for_writing(options.load_stores(config, state, ledger, sets)) as (found, snapshots):
        done = roll_back(found, snapshots, to=to, holder=holder("broker-fl model rollback"), at=time.time())
    dropped = f"; {done.dropped} updates that waited in the buffer are dropped" if done.dropped else ""
    typer.echo(f"version {done.version} has the model of version {done.to}, which is {done.model_digest}{dropped}")
    typer.echo(
        "updates trained from the versions in between will be refused; the aggregator broadcasts it now, or when it starts"
    )


def _write(ledger: "Ledger", state: "State", out: Path, *, without: str | None = None) -> None:
    from aggregator.recovery import manifest_of_ledger
    from aggregator.snapshots import write_model
    from broker_fl.parameters import digest

    facts = ledger.facts()
    about = {
        "federation": facts["federation"],
        "ledger": facts["ledger_id"],
        "version": str(state.version),
        "sha256": digest(state.model),
        # The file has its tensors in another order; joined in this one, they have that digest.
        "order": json.dumps([tensor.name for tensor in manifest_of_ledger(ledger).tensors]),
    }
    if without is not None:
        about["without"] = without
    write_model(state.model, out, manifest=manifest_of_ledger(ledger), facts=about)
    typer.echo(f"wrote {out}: version {state.version}, {digest(state.model)}")
