"""A real federation under faults of every kind, and then an audit: nothing lost, nothing doubled.

Two aggregators with one ledger and four workers, processes of their own, on a private RabbitMQ; between each of them and the
broker a link that can be cut, slowed, silenced. What each training gave is known beforehand, so that all of it can be looked
for afterwards. Exits with 1 where anything was lost, doubled, or otherwise than it should be.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.campaign import Outcome, run
from benchmarks.chaos.disk import own_mounts
from benchmarks.chaos.faults import FAULTS
from benchmarks.report import machine, parser
from broker_fl.cli.running import until_signalled


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--minutes", type=float, default=10.0, help="of faults; start, quiet and audit take some more")
    arguments.add_argument("--seed", type=int, default=0, help="of what happens, to whom, and for how long")
    arguments.add_argument("--only", action="append", choices=sorted(FAULTS), help="only this kind of fault; may be repeated")
    arguments.add_argument("--keep", type=Path, help="copy logs, ledger and outboxes here where something was wrong")
    given = arguments.parse_args()
    kinds = tuple(given.only or FAULTS)
    own_mounts()
    with tempfile.TemporaryDirectory(prefix="broker-fl-chaos-") as folder:
        campaign = run(minutes=given.minutes, seed=given.seed, folder=Path(folder), say=_say, kinds=kinds, keep=given.keep)
        outcome = uvloop.run(until_signalled(campaign))
    _show(outcome)
    if given.json is not None:
        given.json.write_text(json.dumps(record(outcome), indent=2) + "\n", encoding="utf-8")
    sys.stdout.flush()
    # Not by sys.exit: of what torch loads, some complains at length about being left.
    os._exit(1 if outcome.audit.violations else 0)


def _say(text: str) -> None:
    print(text, flush=True)


def record(outcome: Outcome) -> dict[str, object]:
    """What `--json` writes."""
    found = asdict(outcome.audit)
    recoveries = {kind: asdict(recovery) for kind, recovery in outcome.recoveries().items()}
    return {
        "machine": machine(),
        "seed": outcome.seed,
        "minutes": outcome.minutes,
        "faults": outcome.faults.total(),
        "faults_by_kind": dict(sorted(outcome.faults.items())),
        **found,
        "recovery": recoveries,
        "exits": outcome.exits,
    }


def _show(outcome: Outcome) -> None:
    table = Table(title=f"Faults, seed {outcome.seed} ({machine()})", title_justify="left")
    table.add_column("kind")
    for column in ("times", "got over after its end, s: median", "longest", "nothing merged, s: median", "longest"):
        table.add_column(column, justify="right")
    for kind, one in outcome.recoveries().items():
        seconds = (one.median_s, one.longest_s, one.standstill_median_s, one.standstill_longest_s)
        table.add_row(kind, str(one.times), *("" if value is None else f"{value:.1f}" for value in seconds))
    console = Console(width=110)
    console.print(table)
    found = outcome.audit
    console.print(
        f"{outcome.faults.total()} faults; {found.confirmed} updates confirmed: {found.merged} merged, {found.refused} refused, "
        f"{found.lost} lost, {found.doubled} doubled; {found.versions} versions, {found.frames} frames; replay identical: "
        f"{'yes' if found.replay_identical else 'NO'}; largest error of mass {found.largest_mass_error:.1e}",
        highlight=False,
    )
    for violation in found.violations:
        console.print(f"VIOLATION: {violation}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
