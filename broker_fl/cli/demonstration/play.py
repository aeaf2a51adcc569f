"""The demo from its first process to its last, and the parts that late, slow and killed parties have in it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from broker_fl.cli.demonstration.figures import Figures, PartyFigures, watch_events
from broker_fl.cli.demonstration.members import Member
from broker_fl.cli.demonstration.plan import SLOW_THROTTLE
from broker_fl.cli.demonstration.stage import Say, Stage
from broker_fl.config import Settings

_LATE_AT = 0.2
_KILLED_AT = 0.4
"""Shares of the way to the goal."""
_AWAY_S = 4.0
_REFRESH_S = 0.5
_LAST_WORDS_S = 10.0


def new_figures(stage: Stage) -> Figures:
    notes = {stage.demo.late: "comes late", stage.demo.killed: "will be killed", stage.demo.slow: f"{SLOW_THROTTLE:g} x slower"}
    return Figures({name: PartyFigures(note=notes.get(name, "")) for name in stage.workers})


async def play(stage: Stage, settings: Settings, figures: Figures, *, say: Say) -> None:
    """Until the federation is over and everyone has ended. Raises ProcessError if someone ends badly."""
    members = [stage.aggregator, *stage.beside, *stage.workers.values()]
    listening = asyncio.Event()
    async with _stopped_at_the_end(members), asyncio.TaskGroup() as group:
        background = [
            group.create_task(_refresh(stage, settings, figures)),
            group.create_task(watch_events(stage.connect, stage.federation, figures, listening=listening)),
        ]
        # Who listens before the first event has counted them all.
        await listening.wait()
        for member in (stage.aggregator, *stage.beside):
            await member.start()
        aggregator = group.create_task(stage.aggregator.wait())
        for name in stage.workers:
            group.create_task(_take_part(stage, settings, name, figures, aggregator=aggregator, say=say))
        for member in stage.beside:
            group.create_task(member.wait())
        await aggregator
        if settings.evaluation.enabled:
            await _last_words(figures)
        for task in background:
            task.cancel()


@asynccontextmanager
async def _stopped_at_the_end(members: Sequence[Member]) -> AsyncIterator[None]:
    """All at the same time, whatever happened."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(lambda: asyncio.gather(*(member.stop() for member in members)))
        yield


async def _take_part(
    stage: Stage, settings: Settings, name: str, figures: Figures, *, aggregator: asyncio.Task[None], say: Say
) -> None:
    worker = stage.workers[name]
    if name == stage.demo.late:
        await _share_of_the_way(settings, figures, _LATE_AT, unless=aggregator)
        say(f"version {figures.version}: {name} comes late")
        figures.parties[name].note = "came late"
    await worker.start()
    if name == stage.demo.killed:
        await _share_of_the_way(settings, figures, _KILLED_AT, unless=aggregator)
        say(f"version {figures.version}: {name} is killed (kill -9)")
        figures.parties[name].note = "killed"
        await worker.kill()
        await asyncio.sleep(_AWAY_S)
        say(f"version {figures.version}: {name} comes back, with what its outbox held")
        figures.parties[name].note = "was killed"
        await worker.start()
    await worker.wait()


async def _share_of_the_way(settings: Settings, figures: Figures, share: float, *, unless: asyncio.Task[None]) -> None:
    while not unless.done() and _way(settings, figures) < share:
        figures.changed.clear()
        await asyncio.wait(
            [unless, changed := asyncio.ensure_future(figures.changed.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        changed.cancel()


def _way(settings: Settings, figures: Figures) -> float:
    """From 0 to 1, by versions or by time, whichever is further."""
    aggregator = settings.aggregator
    by_versions = figures.version / aggregator.versions if aggregator.versions else 0.0
    by_time = figures.seconds / aggregator.seconds if aggregator.seconds else 0.0
    return max(by_versions, by_time)


async def _refresh(stage: Stage, settings: Settings, figures: Figures) -> None:
    while True:
        figures.online = await stage.online()
        await asyncio.to_thread(figures.read_counters, settings.worker.state)
        figures.changed.set()
        await asyncio.sleep(_REFRESH_S)


async def _last_words(figures: Figures) -> None:
    """The last model's accuracy is on its way when the aggregator has ended."""
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            while not figures.is_final:
                figures.changed.clear()
                await figures.changed.wait()
    except TimeoutError:
        return
