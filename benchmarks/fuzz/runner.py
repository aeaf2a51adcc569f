"""The child that runs the cases, under a limit on its memory, and its parent, which outlives what it does."""

import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from benchmarks.fuzz.fuzzer import Case, Finding, Fuzzer, Tally, grouped
from benchmarks.fuzz.lines import Reached
from benchmarks.fuzz.targets import Target, targets

SILENCE_S = 15.0
"""Without a word from the child for so long, it hangs where no signal reaches Python."""
ADDRESS_SPACE = 1 << 30
"""Over what the child has mapped when it begins."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Said every second, and at the end."""

    tallies: list[Tally]
    reached: Reached


@dataclass(slots=True)
class Result:
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    """The shortest case of each kind."""
    runs: list[Progress] = field(default_factory=list)
    """The last of each child."""

    def tallies(self) -> list[Tally]:
        merged: dict[str, Tally] = {}
        for tally in (tally for run in self.runs for tally in run.tallies):
            total = merged.setdefault(tally.target, Tally(tally.target))
            total.executions += tally.executions
            total.accepted += tally.accepted
            total.outcomes = max(total.outcomes, tally.outcomes)
            total.most_memory = max(total.most_memory, tally.most_memory)
        return sorted(merged.values(), key=lambda tally: tally.target)

    def reached(self) -> Reached:
        """Of the child that reached the most."""
        return max((run.reached for run in self.runs), key=lambda reached: sum(ran for ran, _ in reached.values()), default={})


def fuzz(seconds: float, *, seed: int, only: str = "", made_by: Callable[[], list[Target]] = targets) -> Result:
    """Targets whose names begin with `only`. A child that hangs or dies is a finding, and another goes on with the next seed."""
    result = Result()
    ends = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while (left := ends - time.monotonic()) > 0:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, left, seed, only, made_by), daemon=True)
        child.start()
        theirs.close()
        last, is_silent = _listen(ours, result)
        if is_silent:
            child.kill()
        child.join()
        if child.exitcode != 0:
            what = "the process hangs" if is_silent else f"the process ended with {child.exitcode}"
            _keep(Finding(last.target, what, last.body.hex(), ""), result)
        seed += 1
    return result


def _listen(pipe: Connection, result: Result) -> tuple[Case, bool]:
    """To the end of what the child says: its last case, and whether it fell silent before it ended."""
    last, progress, is_silent = Case("", b""), None, True
    try:
        while pipe.poll(SILENCE_S):
            match pipe.recv():
                case Case() as last:
                    pass
                case Finding() as finding:
                    _keep(finding, result)
                case Progress() as progress:
                    pass
    except EOFError:
        is_silent = False
    if progress is not None:
        result.runs.append(progress)
    return last, is_silent


def _keep(finding: Finding, result: Result) -> None:
    result.findings[finding.kind] = finding
    print(f"found: {finding.target}: {finding.what}", file=sys.stderr, flush=True)


def _child(pipe: Connection, seconds: float, seed: int, only: str, made_by: Callable[[], list[Target]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fuzzer = Fuzzer(grouped(target for target in made_by() if target.name.startswith(only)), Random(seed), pipe.send)
    _limit_address_space()
    ends = time.monotonic() + seconds
    with fuzzer.guarded():
        while (now := time.monotonic()) < ends:
            while time.monotonic() < min(now + 1, ends):
                fuzzer.step()
            pipe.send(Progress(list(fuzzer.tallies.values()), fuzzer.lines.reached()))


def _limit_address_space() -> None:
    mapped = Path("/proc/self/statm")
    if mapped.exists():  # Not on macOS, which keeps no such limit either.
        used = int(mapped.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
