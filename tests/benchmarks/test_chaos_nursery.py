import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.chaos.nursery import Child, ClockFile, Nursery
from broker_fl import __version__
from broker_fl.errors import ProcessError

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 60.0


# What the children run: they import this file as test_chaos_nursery.


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def says_what_it_is() -> None:
    facts = {
        "argv": sys.argv,
        "folder": str(Path.cwd()),
        "greeting": os.environ.get("GREETING"),
        "settings": [name for name in os.environ if name.startswith("BROKER_FL_")],
        "session": os.getsid(0),
        "descriptors": sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())[:-1],  # The last is this listing's.
        "stdin": sys.stdin.read(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "time_is_true": time.time.__module__ == "time",
    }
    say(json.dumps(facts))


def draws() -> None:
    import numpy as np
    import torch

    say(json.dumps([random.random(), np.random.randint(1 << 31), torch.rand(1).item()]))  # noqa: NPY002


def fails() -> None:
    raise ZeroDivisionError("as expected")


def leaves() -> None:
    raise SystemExit(json.loads(sys.argv[1]))


def leaves_a_thread_at_work() -> None:
    threading.Thread(target=lambda: (time.sleep(0.2), say("done"))).start()


def counts() -> None:
    number = 0
    while True:
        say(number)
        number += 1
        time.sleep(0.01)


def tells_the_time() -> None:
    from broker_fl.cli import wiring

    while True:
        say(wiring.time.time() - time.clock_gettime(time.CLOCK_REALTIME))
        time.sleep(0.01)


def has_a_child() -> None:
    with subprocess.Popen(["sleep", "1000"]) as sleeping:
        say(sleeping.pid)


class Cradle:
    """Starts children in a folder of their own, and reads what they say."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.folder = folder

    async def start(self, *argv: str, function: str | None = None, **more: object) -> Child:
        target = {} if function is None else {"target": function if ":" in function else f"test_chaos_nursery:{function}"}
        out, err = self.folder / "out", self.folder / "err"
        async with asyncio.timeout(PATIENCE_S):
            return await self.nursery.start(argv, **{"folder": self.folder, "out": out, "err": err, **target, **more})

    async def ends(self, *argv: str, **more: object) -> int:
        return await _ended(await self.start(*argv, **more))

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def last_line(self) -> str:
        """The last that is whole."""
        return ["", *self.out.split("\n")][-2]


async def _ended(child: Child) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await child.ended()


async def _until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def _state(pid: int) -> str:
    """The letter of /proc; X where there is no such process, or its end has only to be noticed."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
    return "X" if letter == "Z" else letter


def _children(pid: int) -> list[str]:
    """Zombies too."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("BROKER_FL_WORKER__PARTY", "somebody")
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery(environment) -> AsyncIterator[Nursery]:
    async with Nursery() as opened:
        yield opened


@pytest.fixture
def cradle(nursery, tmp_path) -> Cradle:
    return Cradle(nursery, tmp_path)


async def test_broker_fl_prints_its_version(cradle):
    assert await cradle.ends("--version") == 0
    assert cradle.out == f"broker-fl {__version__}\n"
    assert cradle.err == ""


async def test_a_mistake_in_the_settings_is_one_line_and_exit_code_2(cradle):
    assert await cradle.ends("worker") == 2
    assert cradle.out == ""
    assert cradle.err.startswith("error: which party?")
    assert cradle.err.count("\n") == 1


async def test_the_command_goes_by_its_own_name(cradle):
    assert await cradle.ends("worker", "--nonsense") == 2
    assert cradle.err.startswith("Usage: broker-fl worker ")


async def test_a_child_is_what_a_process_of_its_own_would_be(cradle):
    child = await cradle.start("one", "two", function="says_what_it_is", variables={"GREETING": "hello"})
    assert await _ended(child) == 0, cradle.err
    assert json.loads(cradle.out) == {
        "argv": ["broker-fl", "one", "two"],
        "folder": str(cradle.folder),
        "greeting": "hello",
        "settings": [],
        "session": child.pid,
        "descriptors": [0, 1, 2],
        "stdin": "",
        "threads": 1,
        "time_is_true": True,
    }


async def test_what_children_say_is_appended(cradle):
    for _ in range(2):
        await cradle.ends("--version")
    assert cradle.out == 2 * f"broker-fl {__version__}\n"


async def test_children_do_not_share_their_chance(cradle):
    for _ in range(2):
        assert await cradle.ends(function="draws") == 0, cradle.err
    first, second = (json.loads(line) for line in cradle.out.splitlines())
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("left_with", "code", "said"), [(None, 0, ""), (3, 3, ""), ("in words", 1, "in words\n")])
async def test_exit_codes_are_pythons(cradle, left_with, code, said):
    assert await cradle.ends(json.dumps(left_with), function="leaves") == code
    assert cradle.err == said


async def test_an_exception_that_nobody_caught_is_a_traceback_and_exit_code_1(cradle):
    assert await cradle.ends(function="fails") == 1
    assert cradle.err.startswith("Traceback")
    assert cradle.err.endswith("ZeroDivisionError: as expected\n")


async def test_threads_at_work_are_waited_for(cradle):
    assert await cradle.ends(function="leaves_a_thread_at_work") == 0
    assert cradle.out == "done\n"


async def test_a_killed_child_is_gone_and_its_code_is_minus_9(cradle):
    child = await cradle.start(function="counts")
    await _until(cradle.last_line)
    assert child.is_alive
    child.kill()
    assert await _ended(child) == -9
    assert not child.is_alive
    assert _state(child.pid) == "X"
    child.kill()  # Nobody else is meant.


async def test_a_terminated_child_ends_by_that_signal(cradle):
    child = await cradle.start(function="counts")
    child.terminate()
    assert await _ended(child) == -15


async def test_a_frozen_child_stands_still_until_it_thaws_and_can_be_killed(cradle):
    child = await cradle.start(function="counts")
    await _until(cradle.last_line)
    child.freeze()
    await _until(lambda: _state(child.pid) == "T")
    counted = cradle.last_line()
    await asyncio.sleep(0.1)
    assert cradle.last_line() == counted
    assert child.is_alive
    child.thaw()
    await _until(lambda: cradle.last_line() != counted)
    child.freeze()
    child.kill()
    assert await _ended(child) == -9


async def test_a_clock_jumps_while_its_process_runs_and_stays_wrong_for_the_next(cradle):
    clock = ClockFile(cradle.folder / "clock")
    assert clock.offset == 0
    child = await cradle.start(function="tells_the_time", clock=clock)
    await _until(cradle.last_line)
    assert float(cradle.last_line()) == pytest.approx(0, abs=10)
    clock.jump(3600)
    await _until(lambda: float(cradle.last_line()) > 1)
    assert float(cradle.last_line()) == pytest.approx(3600, abs=10)
    clock.jump(-7200)
    await _until(lambda: float(cradle.last_line()) < 1)
    assert float(cradle.last_line()) == pytest.approx(-3600, abs=10)
    assert clock.offset == -3600
    child.kill()
    await _ended(child)
    (cradle.folder / "out").unlink()
    child = await cradle.start(function="tells_the_time", clock=clock)
    await _until(cradle.last_line)
    assert float(cradle.last_line()) == pytest.approx(-3600, abs=10)
    child.kill()
    await _ended(child)


@pytest.mark.parametrize("path", ["folder", "out", "err"])
async def test_a_path_that_cannot_be_is_refused(cradle, path):
    with pytest.raises(ProcessError, match=r"No such file.*/nowhere"):
        await cradle.start("--version", **{path: cradle.folder / "nowhere" / "x"})
    assert await cradle.ends("--version") == 0


async def test_who_is_cancelled_while_starting_leaves_no_child(cradle):
    starting = asyncio.ensure_future(cradle.start(function="counts"))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await cradle.ends("--version") == 0
    await _until(lambda: not _children(cradle.nursery.pid))


async def test_a_hundred_children_leave_nothing_behind(cradle):
    processes = (cradle.nursery.pid, os.getpid())
    descriptors = [_descriptors(pid) for pid in processes]
    for _ in range(10):
        children = [await cradle.start(function="os:getpid") for _ in range(10)]
        assert [await _ended(child) for child in children] == [0] * 10
    assert _children(cradle.nursery.pid) == []
    assert [_descriptors(pid) for pid in processes] == descriptors


async def test_with_a_killed_nursery_its_children_die_and_nobody_waits_in_vain(environment, tmp_path):
    async with Nursery(modules=()) as nursery:
        cradle = Cradle(nursery, tmp_path)
        running = await cradle.start(function="counts")
        frozen = await cradle.start(function="counts")
        frozen.freeze()
        waiting = asyncio.ensure_future(running.ended())
        await asyncio.sleep(0)
        os.kill(nursery.pid, 9)
        with pytest.raises(ProcessError, match="the nursery ended with -9"):
            await asyncio.wait_for(waiting, PATIENCE_S)
        with pytest.raises(ProcessError, match="the nursery ended with -9"):
            await _ended(frozen)
        with pytest.raises(ProcessError, match="the nursery ended with -9"):
            await cradle.start("--version")
        await _until(lambda: _state(running.pid) == _state(frozen.pid) == "X")
        assert not running.is_alive


async def test_its_end_kills_children_and_what_they_started_and_the_body_raises_what_it_did(environment, tmp_path):
    started: list[Child] = []

    async def body() -> None:
        async with Nursery(modules=()) as nursery:
            cradle = Cradle(nursery, tmp_path)
            started.append(await cradle.start(function="has_a_child"))
            await _until(cradle.last_line)
            started.append(await cradle.start(function="counts", out=tmp_path / "other"))
            started[1].freeze()
            raise ZeroDivisionError

    tasks = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        await body()
    assert [await _ended(child) for child in started] == [-9, -9]
    grandchild = int((tmp_path / "out").read_text())
    await _until(lambda: _state(grandchild) == "X")
    assert asyncio.all_tasks() == tasks


async def test_a_nursery_that_cannot_begin_says_so():
    with pytest.raises(ProcessError, match="the nursery ended with 1"):
        async with Nursery(modules=["benchmarks.nowhere"]):
            pass


async def test_a_nursery_whose_imports_leave_threads_behind_does_not_begin(environment, monkeypatch, tmp_path, capfd):
    (tmp_path / "busy.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ProcessError, match="the nursery ended with 1"):
        async with Nursery(modules=["busy"]):
            pass
    assert "imports left threads behind" in capfd.readouterr().err
