"""One federation at work for all attacks of a process, and what it is asked at its end."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.append(str(Path(__file__).parents[1] / "system"))

from battlefield import Battlefield, battlefield

from broker_fl.transports.local_rabbitmq import LocalRabbitMQ


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def field(rabbitmq: LocalRabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Battlefield]:
    async with battlefield(rabbitmq, tmp_path_factory.mktemp("attacks")) as opened:
        yield opened
