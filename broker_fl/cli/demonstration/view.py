"""What a demo shows while it runs and at its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from broker_fl.cli.demonstration.figures import Figures
from broker_fl.cli.demonstration.summary import Summary

_LINE_EVERY_S = 2.0
_REDRAW_S = 0.25
_BUDGET_WIDTH = 18


class News:
    """Live tables on a terminal; lines, now and then, anywhere else."""

    def __init__(self, console: Console, *, goal_versions: int | None, max_epsilon: float | None = None) -> None:
        self._console = console
        self._goal_versions = goal_versions
        self._max_epsilon = max_epsilon

    def say(self, text: str) -> None:
        """Something that happened; it stays above the tables."""
        self._console.print(text, markup=False, soft_wrap=True)

    @asynccontextmanager
    async def about(self, figures: Figures) -> AsyncIterator[None]:
        """Keeps showing the figures while inside, and shows their last state."""
        show = self._show_live if self._console.is_terminal else self._show_lines
        showing = asyncio.create_task(show(figures))
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.wait([showing])

    async def _show_live(self, figures: Figures) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as screen:
            while True:
                screen.update(live(figures, goal_versions=self._goal_versions, max_epsilon=self._max_epsilon), refresh=True)
                await asyncio.sleep(_REDRAW_S)

    async def _show_lines(self, figures: Figures) -> None:
        while True:
            self.say(headline(figures, max_epsilon=self._max_epsilon))
            await asyncio.sleep(_LINE_EVERY_S)


def size(count: float) -> str:
    """In decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def headline(figures: Figures, *, max_epsilon: float | None = None) -> str:
    accuracy = "-" if figures.accuracy is None else f"{figures.accuracy:.1%} (v{figures.accuracy_version})"
    spent = [party.epsilon for party in figures.parties.values() if party.epsilon is not None]
    epsilon = f"{min(spent, default=0):.2f} to {max(spent, default=0):.2f}"
    return (
        f"{figures.seconds:5.0f} s  version {figures.version}  accuracy {accuracy}  "
        f"merged {figures.merged}  refused {figures.refused}  max staleness {figures.max_staleness}  "
        f"up {size(figures.bytes_up)}  down {size(figures.bytes_down)}  online {len(figures.online)}/{len(figures.parties)}"
        f"{'' if max_epsilon is None else f'  epsilon {epsilon} of {max_epsilon:g}'}"
    )


def live(figures: Figures, *, goal_versions: int | None, max_epsilon: float | None = None) -> RenderableType:
    table = Table("party", "", box=None, pad_edge=False)
    for column in ("merged", "refused", "staleness, last", "mean", "up", "down"):
        table.add_column(column, justify="right")
    if max_epsilon is not None:
        table.add_column(f"epsilon spent of {max_epsilon:g}", min_width=_BUDGET_WIDTH)
    for name, party in figures.parties.items():
        mean = f"{party.staleness_sum / party.merged:.1f}" if party.merged else "-"
        online = Text("online", style="green") if name in figures.online else Text("away", style="dim")
        if party.note:
            online.append(f" ({party.note})", style="dim")
        cells: list[RenderableType] = [
            name,
            online,
            str(party.merged),
            str(party.refused),
            str(party.last_staleness) if party.merged else "-",
            mean,
            size(party.bytes_up),
            size(party.bytes_down),
        ]
        if max_epsilon is not None:
            cells.append(_budget(party.epsilon or 0.0, of=max_epsilon))
        table.add_row(*cells)
    lines: list[RenderableType] = [Text(headline(figures), style="bold")]
    if goal_versions is not None:
        # A bar alone does not end its line.
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=goal_versions, completed=min(figures.version, goal_versions)))
        lines.append(bar)
    return Group(*lines, table)


def _budget(spent: float, *, of: float) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=of, completed=min(spent, of), width=_BUDGET_WIDTH - 6), f"{spent:.2f}")
    return row


def show_summary(console: Console, summary: Summary) -> None:
    table = Table(title="The federation is over", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    refused = summary.refused_for.items()
    reasons = ", ".join(reason if count == summary.updates_refused else f"{count} {reason}" for reason, count in refused)
    accuracy = "not evaluated" if summary.accuracy is None else f"{summary.accuracy:.1%}"
    rows = {
        "broker": summary.broker,
        "task": summary.task,
        "parties": str(summary.parties),
        "versions": str(summary.versions),
        "accuracy on held-out data": accuracy,
        "updates merged": str(summary.updates_merged),
        "updates refused": f"{summary.updates_refused}{f' ({reasons})' if reasons else ''}",
        "duplicates recognised": str(summary.duplicates),
        "largest staleness merged": f"{summary.max_staleness_seen} versions",
        "bytes up, all parties": _compared(summary.bytes_up, "dense float32 is", summary.bytes_up_dense_float32),
        "bytes down, all parties": _compared(summary.bytes_down, "whole models are", summary.bytes_down_dense_float32),
        "seconds": f"{summary.seconds:.0f}",
    }
    if summary.epsilon_spent is not None:
        most = "" if summary.max_epsilon is None else f", of {summary.max_epsilon:g}"
        spent = ", ".join(f"{party} {epsilon:.2f}" for party, epsilon in summary.epsilon_spent.items())
        rows[f"epsilon spent{most}"] = f"{spent} (delta {summary.delta:g}, by their own records)"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _compared(count: int, other: str, other_count: int) -> str:
    return f"{size(count)} ({other} {other_count / count:.0f} times as much)" if count else size(count)
