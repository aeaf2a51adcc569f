"""`broker-fl` processes without the seconds that each would spend on importing torch: forked by benchmarks.chaos.nursery, for
callers that have no event loop of their own for as long as the processes live.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from benchmarks.chaos.nursery import BROKER_FL, MODULES, python_path

_PATIENCE_S = 60.0


class Forked:
    """As much of subprocess.Popen as is needed of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self._ended.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Ends with the process that made it, and all that it forked with it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._numbers = count(1)
        self._answers: dict[int, Forked | str] = {}
        self._answered = threading.Condition()
        self._is_gone = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.chaos.nursery", *MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, **python_path(environment)},
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: Sequence[str], *, folder: Path, out: Path, err: Path, variables: Mapping[str, str]) -> Forked:
        number = next(self._numbers)
        request = {
            "number": number,
            "argv": list(arguments),
            "variables": dict(variables),
            "folder": str(folder.absolute()),
            "out": str(out.absolute()),
            "err": str(err.absolute()),
            "clock": None,
            "target": BROKER_FL,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        with self._answered:
            assert self._answered.wait_for(lambda: number in self._answers or self._is_gone, _PATIENCE_S), "nothing was forked"
        answer = self._answers.get(number, "it ended")
        assert isinstance(answer, Forked), f"the fork server started nothing: {answer}"
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._hear(json.loads(line))
        with self._answered:
            self._is_gone = True
            self._answered.notify_all()

    def _hear(self, word: dict[str, object]) -> None:
        with self._answered:
            match word:
                case {"started": int(number), "pid": int(pid)}:
                    self._answers[number] = Forked(pid)
                case {"refused": int(number), "why": why}:
                    self._answers[number] = str(why)
                case {"ended": int(number), "code": int(code)}:
                    ended = self._answers[number]
                    assert isinstance(ended, Forked)
                    ended.end(code)
            self._answered.notify_all()


@functools.cache
def fork_server() -> ForkServer | None:
    """One for each process of the tests; None where it cannot be had."""
    from command_line import environment

    return ForkServer(environment()) if sys.platform == "linux" else None
