"""A fork server: `broker-fl` processes by the hundred, without the seconds that each would spend on importing torch.

One process imports what the commands need and forks; what it forks becomes what a process of its own would be, except that it
dies with the server. They can be killed and frozen, and their wall clock can be made to jump. Linux only.
"""

import asyncio
import ctypes
import gc
import importlib
import json
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from broker_fl.errors import ProcessError

_ROOT = Path(__file__).parents[2]
BROKER_FL = "broker_fl.cli.main:main"
MODULES = (
    "torch",
    "torch._dynamo",  # A second of its own, which a worker spends on its first optimizer.
    "uvloop",
    "anyio._backends._asyncio",
    "httpcore",
    "fsspec.implementations.local",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.sqlite",
    "broker_fl.cli.main",
    "broker_fl.cli.running",
    "broker_fl.cli.wiring",
    "broker_fl.transports.amqp",
)
"""What `broker-fl aggregator` and `broker-fl worker` load sooner or later."""

STOP_S = 10.0

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_PYTHONS_HANDLERS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGPIPE: signal.SIG_IGN,
    signal.SIGXFSZ: signal.SIG_IGN,
}
_PR_SET_PDEATHSIG = 1
_DOUBLE = struct.Struct("<d")
_STDIN, _STDOUT = 0, 1


@dataclass(frozen=True, slots=True)
class ClockFile:
    """By how many seconds `time.time` is wrong in the processes that were given this file, from their start on.

    Nothing else is: not datetime (by which logs are stamped), not the monotonic clocks, not the processes that they start.
    """

    path: Path

    @property
    def offset(self) -> float:
        return float(_DOUBLE.unpack(self.path.read_bytes())[0]) if self.path.exists() else 0.0

    def jump(self, seconds: float) -> None:
        """On from where it is, or back, at once. The file outlives the processes, as a wrong clock does."""
        offset = self.offset + seconds
        with self.path.open("a+b") as file:
            file.truncate(_DOUBLE.size)
            with mmap.mmap(file.fileno(), _DOUBLE.size) as mapped, memoryview(mapped) as view, view.cast("d") as doubles:
                doubles[0] = offset  # In one store, so that nobody reads half of it.


@dataclass(frozen=True, slots=True)
class Child:
    """A process that the nursery forked. Signals reach it alone, and not what it started."""

    pid: int
    _code: asyncio.Future[int] = field(repr=False)

    @property
    def is_alive(self) -> bool:
        """As far as the nursery has told: the event loop hears of an end a moment later."""
        return not self._code.done()

    async def ended(self) -> int:
        """Its exit code, or the signal that ended it, negative. ProcessError: the nursery died, and so did it."""
        return await asyncio.shield(self._code)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        # It may be gone without our knowing it yet. Its number is not somebody else's so soon, since they go round in turn.
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(frozen=True, slots=True)
class _Request:
    """A JSON line. Paths are absolute."""

    number: int
    argv: list[str]
    variables: dict[str, str]
    folder: str
    out: str
    err: str
    clock: str | None
    target: str


class Nursery:
    """At its end all children are killed, and what they started with them. Should it die, so do they.

    What the server itself has to say, as why it could not import something, goes to our standard error.
    """

    def __init__(self, *, modules: Sequence[str] = MODULES) -> None:
        """`modules` are imported before the first fork, the others by each child that needs them."""
        self._modules = modules
        self._numbers = count(1)
        self._starting: dict[int, asyncio.Future[Child]] = {}
        self._codes: dict[int, asyncio.Future[int]] = {}
        self._ready = asyncio.Event()
        self._gone: str | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __aenter__(self) -> Self:
        """Returns when everything is imported. Raises ProcessError."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_FL_")}
        async with AsyncExitStack() as stack:
            group = asyncio.TaskGroup()
            await group.__aenter__()
            # Not entered by the stack, which would tell it what the body raises: the group would wrap it.
            stack.push_async_callback(group.__aexit__, None, None, None)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "benchmarks.chaos.nursery", *self._modules),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Before the installed packages, since Opacus installs a `benchmarks` of its own.
                env={**environment, **_ONE_THREAD, **python_path(environment)},
                start_new_session=True,  # Ctrl-C is for us.
            )
            stack.push_async_callback(_stop, self._process)
            group.create_task(self._listen())
            await self._ready.wait()
            if self._gone is not None:
                raise ProcessError(self._gone)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def start(
        self,
        argv: Sequence[str],
        *,
        folder: Path,
        out: Path,
        err: Path,
        variables: Mapping[str, str] | None = None,
        clock: ClockFile | None = None,
        target: str = BROKER_FL,
    ) -> Child:
        """`broker-fl` with these arguments, in this folder; what it says is appended to the two files.

        `variables` come over our environment, which has lost its BROKER_FL_ ones; those that count when Python starts or torch
        is imported come too late. `target` is the function to call, "module:function". ProcessError: there is no such process.
        """
        if self._gone is not None:
            raise ProcessError(self._gone)
        if clock is not None:
            clock.jump(0.0)  # Makes the file.
        request = _Request(
            number=next(self._numbers),
            argv=list(argv),
            variables=dict(variables or {}),
            folder=_whole(folder),
            out=_whole(out),
            err=_whole(err),
            clock=None if clock is None else _whole(clock.path),
            target=target,
        )
        started: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._starting[request.number] = started
        assert self._process.stdin is not None
        # Without a drain: should the pipe break, the nursery has ended, and whoever listens to it tells us so.
        self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        try:
            return await started
        except asyncio.CancelledError:
            if not started.cancelled() and started.exception() is None:
                started.result().kill()
            raise

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._hear(json.loads(line))
        self._gone = f"the nursery ended with {await self._process.wait()}, and all its children with it"
        waiting: list[asyncio.Future[Any]] = [*self._starting.values(), *self._codes.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(ProcessError(self._gone))
                future.exception()  # Nobody needs to be waiting.
        self._ready.set()

    def _hear(self, word: dict[str, Any]) -> None:
        match word:
            case {"ready": True}:
                self._ready.set()
            case {"started": number, "pid": pid}:
                code = self._codes[number] = asyncio.get_running_loop().create_future()
                child, starting = Child(pid, code), self._starting.pop(number)
                if starting.done():
                    child.kill()  # Whoever asked for it was cancelled meanwhile.
                else:
                    starting.set_result(child)
            case {"refused": number, "why": why}:
                starting = self._starting.pop(number)
                if not starting.done():
                    starting.set_exception(ProcessError(f"the nursery could not start a process: {why}"))
            case {"ended": number, "code": code}:
                self._codes.pop(number).set_result(code)


def python_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Where processes find this package first, and then what they found before."""
    before = environment.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(_ROOT), *([before] if before else [])])}


def _whole(path: Path) -> str:
    return str(path.absolute())


async def _stop(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class _Server:
    """The process that forks: with one thread and no event loop, so that nothing is half done in what it forks."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[int, int]] = {}
        """By the descriptor that tells of its end: the number of the request, and the process."""

    def serve(self) -> None:
        """Until stdin closes: however our parent ends, kill -9 included, the pipe that it holds does."""
        _say(ready=True)
        unread = b""
        try:
            while True:
                ready, _, _ = select.select([_STDIN, *self._running], [], [])
                for descriptor in self._running.keys() & ready:
                    self._reap(descriptor)
                if _STDIN in ready:
                    read = os.read(_STDIN, 1 << 16)
                    if not read:
                        return
                    *lines, unread = (unread + read).split(b"\n")
                    for line in lines:
                        self._start(_Request(**json.loads(line)))
        finally:
            self._end_all()

    def _start(self, request: _Request) -> None:
        try:
            pid = _fork(request)
        except OSError as exc:
            _say(refused=request.number, why=str(exc))
            return
        self._running[os.pidfd_open(pid)] = request.number, pid
        _say(started=request.number, pid=pid)

    def _reap(self, descriptor: int) -> None:
        os.close(descriptor)
        number, pid = self._running.pop(descriptor)
        _, status = os.waitpid(pid, 0)
        _say(ended=number, code=os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        for _, pid in self._running.values():
            with suppress(ProcessLookupError):  # It died before it had a session.
                os.killpg(pid, signal.SIGKILL)
        for descriptor in list(self._running):
            with suppress(BrokenPipeError):
                self._reap(descriptor)


def _say(**word: object) -> None:
    os.write(_STDOUT, json.dumps(word).encode() + b"\n")


def _fork(request: _Request) -> int:
    """What can be wrong with the paths is said by an OSError, before there is a process."""
    with ExitStack() as opened:

        def descriptor(path: str, flags: int) -> int:
            number = os.open(path, flags, 0o666)
            opened.callback(os.close, number)
            return number

        folder = descriptor(request.folder, os.O_DIRECTORY)
        stdio = [descriptor(os.devnull, os.O_RDONLY)]
        stdio += [descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (request.out, request.err)]
        begun, begins = os.pipe()
        opened.callback(os.close, begun)
        server = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                _live(request, stdio, folder=folder, server=server)
        finally:
            os.close(begins)
        # The child closes its end together with all that is the server's. Nobody may freeze it before: it would not die with us.
        os.read(begun, 1)
        return pid


def _live(request: _Request, stdio: Sequence[int], *, folder: int, server: int) -> NoReturn:
    """The child. It leaves by _exit: what the server has on its stack and in atexit is not the child's to end."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os.kill(os.getpid(), signal.SIGKILL)  # It died before we had asked to die with it.
        for number, opened in enumerate(stdio):
            os.dup2(opened, number)
        os.fchdir(folder)
        os.closerange(len(stdio), os.sysconf("SC_OPEN_MAX"))
        code = _run(request)
        # As Python does at its end: threads that are no daemons are waited for.
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _run(request: _Request) -> int:
    """The exit code, by the rules of Python."""
    module, _, name = request.target.partition(":")
    try:
        _become(request)
        getattr(importlib.import_module(module), name)()
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return (exc.code or 0) & 0xFF
        print(exc.code, file=sys.stderr)
        return 1
    except BaseException as exc:  # noqa: BLE001
        sys.excepthook(type(exc), exc, exc.__traceback__)
        return 1
    return 0


def _become(request: _Request) -> None:
    """What a new process has for itself, and a fork shares with its parent."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, _PYTHONS_HANDLERS.get(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.update(request.variables)
    # Python's own module `random` does so by itself.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if request.clock is not None:
        time.time = _jumping(Path(request.clock))
    sys.argv = ["broker-fl", *request.argv]
    sys.modules["__main__"].__package__ = None  # By which click tells how the program was called.


def _jumping(file: Path) -> Callable[[], float]:
    with file.open("rb") as opened:
        offset = memoryview(mmap.mmap(opened.fileno(), _DOUBLE.size, access=mmap.ACCESS_READ)).cast("d")
    true = time.time
    return lambda: true() + offset[0]


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threads = len(list(Path("/proc/self/task").iterdir())), threading.active_count()
    if threads != (1, 1):
        raise ProcessError(f"imports left threads behind, {threads} of the kernel and of Python, and a fork would lose them")
    # Never looked at again, so that the children go on sharing its pages.
    gc.collect()
    gc.freeze()
    _Server().serve()
    os._exit(0)  # At Python's own end triton would tell us what it leaks.


if __name__ == "__main__":
    main()
