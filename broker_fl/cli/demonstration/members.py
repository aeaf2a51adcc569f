"""The aggregator and the workers of a demo: processes of their own, or tasks where the broker is in this process."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any, Protocol

from broker_fl.cli.options import Flags, environment_of
from broker_fl.config import ENVIRONMENT_PREFIX, OTHER_VARIABLES
from broker_fl.errors import ProcessError

_STOP_S = 15.0


class Member(Protocol):
    """One of them. A killed one can be started again."""

    name: str

    async def start(self) -> None: ...

    async def kill(self) -> None:
        """As `kill -9` does."""

    async def stop(self) -> None:
        """Cleanly, whatever state it is in."""

    async def wait(self) -> None:
        """Until it ends. Raises ProcessError unless it ended well or was killed by us."""


class ProcessMember:
    """`broker-fl COMMAND`, its settings in the environment, what it says in a file. It ends when this process does."""

    def __init__(self, name: str, *, command: str, flags: Flags, log_file: Path, arguments: tuple[str, ...] = ()) -> None:
        self.name = name
        self._command = command
        self._arguments = arguments
        self._flags = flags
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False

    async def start(self) -> None:
        # -P: a folder named workers or schemas in the user's current directory must not take the place of ours.
        self._killed = False
        with self._open_log() as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "broker_fl", self._command, "--until-stdin-closes", *self._arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**_own_environment(), **environment_of(self._flags)},
                # Ctrl-C is for the demo, which then stops all in order.
                start_new_session=True,
            )

    def _open_log(self) -> IO[bytes]:
        return self._log_file.open("ab")

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._killed = True
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def wait(self) -> None:
        if self._process is None:
            return
        code = await self._process.wait()
        if code and not self._killed:
            raise ProcessError(f"{self.name} ended with exit code {code}: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or ["it said nothing"])[-1].removeprefix("error: ")


def _own_environment() -> dict[str, str]:
    """Without settings: an administrator's URL must not reach the workers, and a demo's settings are all its own."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES
    }


class TaskMember:
    """A coroutine in this process."""

    def __init__(self, name: str, serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.name = name
        self._serve = serve
        self._task: asyncio.Task[None] | None = None
        self._killed = False

    async def start(self) -> None:
        self._killed = False
        self._task = asyncio.create_task(self._serve(), name=self.name)

    async def kill(self) -> None:
        if self._task is not None and not self._task.done():
            self._killed = True
            await self._cancel(self._task)

    async def stop(self) -> None:
        await self.kill()

    async def wait(self) -> None:
        if self._task is None:
            return
        await asyncio.wait([self._task])
        if not self._killed:
            self._task.result()

    @staticmethod
    async def _cancel(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])
