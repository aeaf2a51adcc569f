"""A process of the federation, and whoever starts it again when it ends, as an init system does."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.chaos.disk import Disk
from benchmarks.chaos.nursery import Child, ClockFile, Nursery
from benchmarks.chaos.proxy import Link

_PAUSE_S = 0.2
"""Between an end and the next start."""


class Member:
    def __init__(
        self,
        name: str,
        *,
        nursery: Nursery,
        argv: Sequence[str],
        variables: Mapping[str, str],
        disk: Disk,
        link: Link,
        clock: ClockFile,
        logs: Path,
    ) -> None:
        self.name = name
        self.disk = disk
        self.link = link
        self.clock = clock
        self.exits: Counter[int] = Counter()
        self.variables = dict(variables)
        self._nursery = nursery
        self._argv = list(argv)
        self._logs = logs
        self._child: Child | None = None
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._failpoint: str | None = None
        self._is_last = False

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.is_alive else None

    @property
    def log(self) -> Path:
        return self._logs / f"{self.name}.err"

    async def run(self) -> None:
        """Until it ends by itself after `let_end` was called."""
        while True:
            await self._may_run.wait()
            variables = dict(self.variables)
            if self._failpoint is not None:
                variables["BROKER_FL_FAILPOINTS"], self._failpoint = self._failpoint, None
            self._child = await self._nursery.start(
                self._argv,
                folder=self.disk.folder,
                out=self._logs / f"{self.name}.out",
                err=self.log,
                variables=variables,
                clock=self.clock,
            )
            code = await self._child.ended()
            self.exits[code] += 1
            if code == 0 and self._is_last:
                return
            await asyncio.sleep(_PAUSE_S)

    def hold_down(self) -> None:
        """What ends is not started again until `let_up`."""
        self._may_run.clear()

    def let_up(self) -> None:
        self._may_run.set()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def terminate(self) -> None:
        if self._child is not None:
            self._child.terminate()

    def freeze(self) -> None:
        if self._child is not None:
            self._child.freeze()

    def thaw(self) -> None:
        if self._child is not None:
            self._child.thaw()

    def arm(self, failpoint: str) -> None:
        """For its next start, which is now."""
        self._failpoint = failpoint
        self.kill()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """It has ended in order while inside, and is started again."""
        self.hold_down()
        try:
            self.terminate()
            if self._child is not None:
                await self._child.ended()
            yield
        finally:
            self.let_up()

    async def restart(self, **variables: str) -> None:
        """In order, with these settings over its own."""
        async with self.stopped():
            self.variables.update(variables)

    def let_end(self) -> None:
        """From now on it may end by itself, and is not started again."""
        self._is_last = True
