"""`broker-fl` as its users run it: processes of their own, what they say in files."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fork_server import Forked, fork_server

from broker_fl.transports.local_rabbitmq import SERVER_VARIABLE

COMMAND = (sys.executable, "-P", "-m", "broker_fl")

PATIENCE_S = 150.0
"""The bound of every wait, for machines that are busy with other things; an idle one needs a tenth of it."""

POLL_S = 0.03
_SHOWN_LINES = 30


async def until(condition: Callable[[], object], what: str, *, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s in vain: {what}"
        await asyncio.sleep(POLL_S)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without settings, and one thread for each process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_FL_") or name == SERVER_VARIABLE}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **threads, **(more or {})}


class Running:
    """One process. Whoever starts it ends it: `end` in a finally."""

    def __init__(
        self,
        *arguments: str,
        name: str,
        logs: Path,
        folder: Path,
        variables: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        afresh: bool = False,
    ) -> None:
        """`afresh`: a Python of its own, as a user's; else forked from one that has imported everything, where that can be."""
        self.name = name
        self.arguments = arguments
        start = sum(1 for _ in logs.glob(f"{name}.*.err")) + 1
        self._out, self._err = (logs / f"{name}.{start}.{stream}" for stream in ("out", "err"))
        server = None if afresh or wrapper else fork_server()
        if server is not None:
            files = {"out": self._out, "err": self._err}
            self._process: subprocess.Popen[bytes] | Forked = server.start(
                arguments, folder=folder, variables=variables or {}, **files
            )
            return
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                (*wrapper, *COMMAND, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment(variables),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        """Those of its log that hold the text."""
        return [line for line in self.err.splitlines() if text in line]

    async def says(self, text: str, *, times: int = 1) -> None:
        """Waits until its log has it."""
        said = lambda: len(self.lines(text)) >= times  # noqa: E731
        await until(lambda: said() or not self.is_alive, f"{self} says {text!r} {times} times\n{self.report()}")
        assert said(), f"{self} ended with {self._process.returncode} and never said {text!r}\n{self.report()}"

    async def ends(self, *, within_s: float = PATIENCE_S) -> int:
        """Its exit code, when it has ended by itself."""
        await until(lambda: not self.is_alive, f"{self} ends\n{self.report()}", within_s=within_s)
        return self._process.returncode

    async def ends_well(self, *, within_s: float = PATIENCE_S) -> None:
        code = await self.ends(within_s=within_s)
        assert code == 0, f"{self} ended with {code}\n{self.report()}"

    async def ends_with_one_line(self) -> str:
        """What every expected mistake comes to: exit code 2, one line on standard error, no traceback. Returns the line."""
        code = await self.ends()
        assert code == 2, f"{self} ended with {code}\n{self.report()}"
        assert "Traceback" not in self.err, self.report()
        errors = self.lines("error: ")
        assert len(errors) == 1, self.report()
        assert self.err.endswith(f"{errors[0]}\n"), self.report()
        return errors[0].removeprefix("error: ")

    def terminate(self) -> None:
        self._process.terminate()

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def report(self) -> str:
        """The end of what it said."""
        both = {"out": self.out, "err": self.err}
        shown = [f"--- {self} {name} ---\n" + "\n".join(text.splitlines()[-_SHOWN_LINES:]) for name, text in both.items() if text]
        return "\n".join(shown)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process number is used again; with its start it is one process."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[1] == self.started


def descendants(pid: int) -> set[ProcessId]:
    """All that are there now, by /proc."""
    children: dict[int, list[ProcessId]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))):
            children.setdefault(found[0], []).append(ProcessId(int(entry.name), found[1]))
    reached: set[ProcessId] = set()
    wave = children.get(pid, [])
    while wave:
        reached.update(wave)
        wave = [below for process in wave for below in children.get(process.pid, [])]
    return reached


def _stat(pid: int) -> tuple[int, int] | None:
    """Parent and start of a process; None where it has ended."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))
