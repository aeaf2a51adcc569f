import time

import pytest

from broker_fl import failpoints
from broker_fl.errors import ConfigurationError
from broker_fl.failpoints import FAILPOINTS, arm, disarm, reach


@pytest.fixture(autouse=True)
def disarmed():
    yield
    disarm()


@pytest.mark.parametrize("name", sorted(FAILPOINTS))
def test_failpoint_that_is_not_armed_does_nothing(name):
    before = time.monotonic()
    arm(f"{next(other for other in FAILPOINTS if other != name)}=sleep:30")
    reach(name)
    assert time.monotonic() - before < 30


def test_failpoint_dies_at_the_crossing_that_was_asked_for(monkeypatch):
    died = []
    monkeypatch.setattr(failpoints.os, "kill", lambda pid, number: died.append(number))
    arm("worker.sent=kill@3, worker.kept=freeze")
    for _ in range(2):
        reach("worker.sent")
    assert died == []
    reach("worker.sent")
    reach("worker.kept")
    assert died == [failpoints.signal.SIGKILL, failpoints.signal.SIGSTOP]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker.snet=kill", "no failpoint 'worker.snet': did you mean 'worker.sent'"),
        ("worker.sent=kil", "worker.sent cannot 'kil': did you mean 'kill'"),
        ("worker.sent", "worker.sent cannot ''"),
        ("worker.sent=kill@twice", "expected NAME=kill@3"),
        ("worker.sent=sleep:long", "expected NAME=kill@3"),
    ],
)
def test_mistake_is_named_with_what_was_meant(text, expected):
    with pytest.raises(ConfigurationError, match=expected):
        arm(text)
