"""Deaths at moments that no signal can be timed for: between commit and acknowledgement, between two parts, and all the
others.
"""

import asyncio
from pathlib import Path

import pytest
from command_line import until

from benchmarks.chaos.campaign import Outcome, federation
from benchmarks.chaos.faults import armed
from benchmarks.chaos.stage import IN_PARTS, Stage, until_progress
from broker_fl.failpoints import FAILPOINTS

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

KILLED = -9

CROSSING = {"aggregator.lead": 1, "aggregator.keyframe": 1, "aggregator.snapshot": 1}
"""Those that are seldom crossed."""


async def test_process_that_dies_at_any_failpoint_loses_and_doubles_nothing(rabbitmq, temporary: Path) -> None:
    outcome = Outcome(seed=0, minutes=0)
    async with federation(temporary, outcome, say=print) as stage:
        for name in FAILPOINTS:
            await dies_at(stage, name)
    assert outcome.audit.violations == []
    assert (outcome.audit.lost, outcome.audit.doubled, outcome.audit.replay_identical) == (0, 0, True)
    assert outcome.audit.confirmed == outcome.audit.merged + outcome.audit.refused > 100


async def dies_at(stage: Stage, name: str) -> None:
    """Somebody really dies there, and goes on afterwards."""
    before = {one.name: one.exits[KILLED] for one in stage.members.values()}
    async with armed(stage, f"{name}=kill@{CROSSING.get(name, 2)}", worker=stage.members[IN_PARTS]) as member:
        # Once by us, so that it starts with the failpoint, and once by the failpoint.
        await until(lambda: member.exits[KILLED] >= before[member.name] + 2, f"{member.name} dies at {name}")
    party = member.name if member.name == IN_PARTS else None
    since = await asyncio.to_thread(stage.entries, party)
    assert await until_progress(stage, since=since, party=party, within_s=60) is not None, f"nothing goes on after {name}"
