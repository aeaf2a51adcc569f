"""Running a service on the event loop until it ends or a signal stops it."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """On uvloop, where there is one."""
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    return uvloop.run(main)


async def until_signalled(main: Coroutine[Any, Any, Result]) -> Result:
    """SIGTERM and SIGINT alike cancel it, so that it ends what it started; the exit code is then the shell's for the signal."""
    task = asyncio.ensure_future(main)
    received: list[int] = []

    def cancel(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, cancel, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise


async def serve(service: Awaitable[None], stop: Callable[[], None], *, until_stdin_closes: bool) -> None:
    """Runs a service that SIGTERM and SIGINT stop cleanly, and where asked for the end of its parent."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(_stop_when_orphaned(stop)) if until_stdin_closes else None
        await service
        if watch is not None:
            watch.cancel()


async def _stop_when_orphaned(stop: Callable[[], None]) -> None:
    """However the parent ends, kill -9 included, the pipe that it holds closes."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop()
