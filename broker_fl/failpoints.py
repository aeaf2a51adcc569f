"""Named moments at which a process can be made to die, freeze or wait: for tests of what no signal can be timed for.

Off unless `arm` was called, which the command line does where BROKER_FL_FAILPOINTS is set; else a crossing costs a look at an
empty dict. `BROKER_FL_FAILPOINTS=aggregator.committed=kill@3,worker.sent=sleep:0.5` kills at the third crossing of the one, and
waits half a second at each of the other.
"""

import os
import signal
import time
from dataclasses import dataclass

from broker_fl.errors import ConfigurationError, nearest

VARIABLE = "BROKER_FL_FAILPOINTS"

FAILPOINTS: dict[str, str] = {
    "aggregator.decided": "entries and frame are in the transaction, which is not committed",
    "aggregator.committed": "a group of updates is committed; no receipt is sent, nothing is acknowledged",
    "aggregator.answered": "the receipts are out; nothing is acknowledged",
    "aggregator.acknowledged": "the group is acknowledged; its event is not told",
    "aggregator.snapshot": "a snapshot's file is written; the ledger does not name it",
    "aggregator.frame": "a frame is committed; nothing of it is published",
    "aggregator.keyframe": "the keyframe of a frame is out; the frame is not",
    "aggregator.frame-part": "a part of a frame is out, and others are not",
    "aggregator.published": "a frame is out and confirmed; it is not marked so",
    "aggregator.lead": "the lead is taken; the ledger is not read",
    "worker.received": "a model is received; it is not kept on the disk",
    "worker.trained": "a training has ended; its update is not in the outbox",
    "worker.spent": "an update and what it cost are in the transaction, which is not committed",
    "worker.kept": "an update is in the outbox; it is not sent",
    "worker.part": "a part of an update is confirmed, and others are not sent",
    "worker.sent": "an update is confirmed; it is not marked so",
    "worker.receipt": "a receipt is read; its update is not settled",
    "worker.settled": "an update is settled; its receipt is not acknowledged",
}

ACTIONS = ("kill", "freeze", "sleep")


@dataclass(slots=True)
class _Armed:
    action: str
    seconds: float
    crossings_left: int


_armed: dict[str, _Armed] = {}


def reach(name: str) -> None:
    """Does what the failpoint was armed with; nothing where it was not. Blocks the thread that calls it."""
    if _armed and name in _armed:
        _act(_armed[name])


def arm(text: str) -> None:
    """Raises ConfigurationError for a name or action that there is not."""
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = item.partition("=")
        wanted, _, crossing = rest.partition("@")
        action, _, seconds = wanted.partition(":")
        if name not in FAILPOINTS:
            raise ConfigurationError(f"{VARIABLE}: no failpoint {name!r}: {nearest(name, FAILPOINTS)}")
        if action not in ACTIONS:
            raise ConfigurationError(f"{VARIABLE}: {name} cannot {action!r}: {nearest(action, ACTIONS)}")
        try:
            _armed[name] = _Armed(action, float(seconds or 0), int(crossing or 1))
        except ValueError as exc:
            raise ConfigurationError(f"{VARIABLE}: expected NAME=kill@3, =freeze@1 or =sleep:0.5, not {item!r}") from exc


def disarm() -> None:
    _armed.clear()


def _act(armed: _Armed) -> None:
    if armed.action == "sleep":
        time.sleep(armed.seconds)
        return
    armed.crossings_left -= 1
    if armed.crossings_left == 0:
        os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGSTOP)
