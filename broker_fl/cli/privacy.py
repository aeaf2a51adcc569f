"""`broker-fl privacy`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from broker_fl.config import Settings
    from broker_fl.privacy.report import Report

app = typer.Typer(help="What trainings have cost the parties' privacy.", no_args_is_help=True)

Enrolment = Annotated[Path | None, typer.Option("--enrolment", help="NAME.toml, where the worker has one.", show_default=False)]


@app.command("report")
def report(
    party: Annotated[str | None, typer.Option("--party", help="Whose.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="NAME.html or NAME.json; a summary on the screen without.", show_default=False)
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Without it, the party's own.", show_default=False)] = None,
    enrolment: Enrolment = None,
    config: options.Config = None,
    state: options.State = None,
    sets: options.Sets = None,
) -> None:
    """What was promised to a party's examples, each training, and what all of them cost; from the party's own record alone.

    For --out report.html, report.json is written beside it.
    """
    from broker_fl.errors import ConfigurationError

    if out is not None and out.suffix not in (".html", ".json"):
        raise ConfigurationError(f"--out {out}: expected a name that ends in .html or .json")
    settings = options.load(config, options.flags_of({"worker.party": party, "worker.state": state}, sets), enrolment)
    made = _report(settings, delta)
    if out is None:
        _show(made)
    else:
        _write(made, out)


def _report(settings: "Settings", delta: float | None) -> "Report":
    from broker_fl.errors import ConfigurationError
    from broker_fl.privacy.report import report_of
    from workers.spending import open_spending, spending_file

    name = settings.worker.party
    if name is None:
        raise ConfigurationError("whose privacy? name the party by --party NAME or --enrolment NAME.toml")
    if delta is not None and not 0 < delta < 1:
        raise ConfigurationError(f"--delta {delta:g}: expected a number between 0 and 1, as in 1e-5")
    with open_spending(spending_file(settings.worker.state, name, settings.privacy.record)) as spending:
        return report_of(spending.trainings(), spending.promises(), party=name, record=spending.id, delta=delta)


def _write(made: "Report", out: Path) -> None:
    from broker_fl.database import storage_errors
    from broker_fl.privacy.page import as_html
    from broker_fl.privacy.report import as_json

    files = {out: as_html(made), out.with_suffix(".json"): as_json(made)} if out.suffix == ".html" else {out: as_json(made)}
    for file, text in files.items():
        with storage_errors(str(file)):
            file.write_text(text, encoding="utf-8")
    typer.echo(f"{len(made.trainings)} trainings: {', '.join(map(str, files))}")


def _show(made: "Report") -> None:
    typer.echo(f"party {made.party}: {len(made.trainings)} trainings, at delta {made.delta:g}")
    for cost in made.costs:
        typer.echo(f"  epsilon by {cost.accountant}: {cost.why if cost.epsilon is None else f'{cost.epsilon:.4f}'}")
    for federation, costs in made.costs_by_federation.items():
        typer.echo(f"  in federation {federation}: {_said(costs[0].epsilon)} (rdp)")


def _said(epsilon: float | None) -> str:
    return "no answer" if epsilon is None else f"{epsilon:.4f}"


@app.command("parties")
def parties(
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    sets: options.Sets = None,
) -> None:
    """What each party has spent, as the aggregator's ledger knows it: of its examples, by its own word, and as a client."""
    from aggregator.client_privacy import WARNING, spent_as_clients
    from broker_fl.cli.stores import stores_for_reading
    from broker_fl.privacy.accounting import epsilon_of

    settings = options.load_stores(config, state, ledger, sets)
    delta = settings.privacy.delta
    with stores_for_reading(settings) as (found, _):
        by_example, as_clients = found.spent_by_party(), spent_as_clients(found)
        names = found.parties()
    typer.echo(f"at delta {delta:g}, by rdp:")
    for name in names:
        noised = by_example.get(name)
        said = ["its examples have no noise"]
        if noised is not None:
            said = [f"each example epsilon {epsilon_of(noised, delta=delta, accountant='rdp'):.4f}"]
        if name in as_clients:
            history = as_clients[name]
            epsilon = None if history is None else epsilon_of(history, delta=delta, accountant="rdp")
            said.append("as a client not hidden" if epsilon is None else f"as a client epsilon {epsilon:.4f}")
        typer.echo(f"  {name}: {', '.join(said)}")
    if as_clients:
        typer.echo(f"warning: {WARNING}")
