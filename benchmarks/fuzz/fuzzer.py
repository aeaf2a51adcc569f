"""Cases, one after the other, and what becomes of them."""

import re
import resource
import signal
import sys
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.fuzz.lines import Lines
from benchmarks.fuzz.targets import Target
from broker_fl.errors import DecodeError

CASE_S = 2.0
"""Of processor time."""
RESIDENT_SLACK = 16 << 20
"""The process grows in steps, and not for the case alone."""
CORPUS = 512
TRACED = 0.25
"""The share of cases whose lines are noted: it costs as much as the case."""


@dataclass(frozen=True, slots=True)
class Case:
    """Said before it is run."""

    target: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    target: str
    what: str
    hex: str
    trace: str

    @property
    def kind(self) -> tuple[str, str]:
        """Findings of one kind are taken for the same fault: the group of the target, and `what`."""
        return self.target.partition("/")[0], self.what


@dataclass(slots=True)
class Tally:
    """Of a group of targets."""

    target: str
    executions: int = 0
    accepted: int = 0
    outcomes: int = 0
    """Different ones: the refusals by their text, numbers and names aside."""
    most_memory: float = 0.0
    """The largest share of the declared memory that a case took."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def grouped(targets: Iterable[Target]) -> dict[str, list[Target]]:
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    return groups


@dataclass(slots=True)
class Fuzzer:
    """Runs cases in this process, whose signals, warnings and tracing are its own while `guarded`."""

    groups: dict[str, list[Target]]
    random: Random
    say: Callable[[Case | Finding], None]
    case_s: float = CASE_S
    tallies: dict[str, Tally] = field(default_factory=dict)
    lines: Lines = field(default_factory=Lines)
    _corpora: dict[str, list[bytes]] = field(default_factory=dict)
    _outcomes: dict[str, set[str]] = field(default_factory=dict)
    _shortest: dict[tuple[str, str], int] = field(default_factory=dict)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        traced, handler = sys.gettrace(), signal.signal(signal.SIGPROF, self._on_time_out)
        tracemalloc.start(1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield
        finally:
            tracemalloc.stop()
            signal.signal(signal.SIGPROF, handler)
            sys.settrace(traced)

    def step(self) -> None:
        """One case of a target of a group; codecs come half of the time, the other groups share the rest."""
        names = [name for name in self.groups if name != "codec"]
        group = self.groups.get("codec", [])
        if names and (not group or self.random.random() < 0.5):
            group = self.groups[self.random.choice(names)]
        target = self.random.choice(group)
        corpus = self._corpora.get(target.name)
        if corpus is None:
            corpus = self._corpora[target.name] = target.seeds()
            for seed in (*corpus, *target.bombs):
                self.try_case(target, seed)
        body = target.mutate(self.random.choice(corpus), corpus, self.random)
        if self.try_case(target, body) and len(corpus) < CORPUS:
            corpus.append(body)

    def try_case(self, target: Target, body: bytes) -> bool:
        """Whether it did something new: reached a line, or had an outcome that no case of its group had."""
        self.say(Case(target.name, body))
        found, resident = self.lines.found, _most_resident()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        outcome = self._outcome(target, body)
        _, peak = tracemalloc.get_traced_memory()
        taken, bound = max(peak - held, _most_resident() - resident - RESIDENT_SLACK), target.bound(body)
        if taken > bound:
            self._find(target, body, MemoryError(f"{taken} bytes of memory, {bound} are declared"))
        tally = self.tallies.setdefault(target.group, Tally(target.group))
        tally.executions += 1
        tally.accepted += not outcome
        tally.most_memory = max(tally.most_memory, taken / bound)
        outcomes = self._outcomes.setdefault(target.group, set())
        outcomes.add(outcome)
        new = self.lines.found > found or len(outcomes) > tally.outcomes
        tally.outcomes = len(outcomes)
        return new

    def _outcome(self, target: Target, body: bytes) -> str:
        """Empty for a case that is accepted."""
        signal.setitimer(signal.ITIMER_PROF, self.case_s)
        sys.settrace(self.lines if self.random.random() < TRACED else None)
        try:
            target.run(body)
        except DecodeError as exc:
            return re.sub(r"'.*'|\".*\"|[-+.\w]*\d[-+.\w]*", "_", str(exc), flags=re.DOTALL)[:80]
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001 - A panic of compiled code is no Exception.
            self._find(target, body, exc)
            return "found"
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_PROF, 0)
        return ""

    def _on_time_out(self, *_: object) -> None:
        raise Hang(f"still running after {self.case_s:g} s of processor time")

    def _find(self, target: Target, body: bytes, exc: BaseException) -> None:
        """Said again only with a shorter case."""
        every = traceback.extract_tb(exc.__traceback__)
        steps = [step for step in every if step.filename != __file__]
        place = f" at {'/'.join(Path(steps[-1].filename).parts[-2:])}:{steps[-1].lineno}" if steps else ""
        finding = Finding(target.name, type(exc).__name__ + place, body.hex(), "".join(traceback.format_exception(exc)))
        if len(body) < self._shortest.get(finding.kind, sys.maxsize):
            self._shortest[finding.kind] = len(body)
            self.say(finding)


# The same figure, and 200 times faster: the kernel need not add up the other threads.
_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


def _most_resident() -> int:
    """Bytes, since the process began."""
    most = resource.getrusage(_WHO).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
