"""Exchanges, queues, bindings, permissions and policies, as data: what a federation looks like on the broker.

Fixed by declaration is only what never changes (types, dead-lettering, single active consumer). Lengths, ages and limits are
policies, since a queue that is declared again with other arguments fails (406), while an operator edits a policy at any time.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ExchangeKind = Literal["fanout", "direct", "topic"]
QueueKind = Literal["quorum", "stream", "classic"]
Argument = str | int | bool

MIB = 1 << 20

MOST_TOKENS = 4
"""That wait in the queue of the leaders; each aggregator that connects brings one. The one that is kept does not wait."""

MOST_WAITING_BYTES = 4096 * MIB
"""Of updates that no aggregator took yet."""
MOST_OWN_BYTES = 1024 * MIB
"""Of broadcasts in one queue of somebody who reads them besides the parties; and how long it may stay unread."""
OWN_EXPIRES_S = 7 * 24 * 3600

EVALUATOR = "evaluator"
"""What its queues are called by: see `Names.own_of`."""

SUSPENDED: Mapping[str, int] = {"max-connections": 0}
"""The limits of a party that may not log in."""


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: ExchangeKind


@dataclass(frozen=True, slots=True)
class Queue:
    """Durable. `arguments` are the ones beside x-queue-type."""

    name: str
    kind: QueueKind
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    def all_arguments(self) -> dict[str, Argument]:
        return {"x-queue-type": self.kind, **self.arguments}


@dataclass(frozen=True, slots=True)
class Binding:
    exchange: str
    queue: str
    routing_key: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    pattern: str
    apply_to: Literal["queues"]
    definition: Mapping[str, Argument]
    priority: int = 1


@dataclass(frozen=True, slots=True)
class InboxLimits:
    """What one party's receipts may take. They are in the ledger too, and sent again for an update that comes again."""

    messages: int = 10_000
    bytes: int = 64 * MIB
    ttl_s: int = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Topology:
    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True)
class Permissions:
    """Regular expressions over names, as RabbitMQ has them."""

    configure: str
    write: str
    read: str


@dataclass(frozen=True, slots=True)
class Names:
    """What everything of one federation is called."""

    federation: str

    @property
    def updates(self) -> str:
        return f"fl.{self.federation}.updates"

    @property
    def quarantine(self) -> str:
        """An exchange and its queue: what was refused, and why."""
        return f"fl.{self.federation}.quarantine"

    @property
    def model(self) -> str:
        """The fanout exchange of the broadcasts."""
        return f"fl.{self.federation}.model"

    @property
    def model_log(self) -> str:
        return f"fl.{self.federation}.model.log"

    @property
    def keyframes(self) -> str:
        """The exchange of the whole models, which only those read who cannot go on by the changes."""
        return f"fl.{self.federation}.keyframes"

    @property
    def keyframe_log(self) -> str:
        return f"fl.{self.federation}.keyframes.log"

    @property
    def receipts(self) -> str:
        return f"fl.{self.federation}.receipts"

    @property
    def events(self) -> str:
        return f"fl.{self.federation}.events"

    @property
    def leader(self) -> str:
        """An exchange and its queue, which holds what the one aggregator at work keeps: aggregator/leadership.py."""
        return f"fl.{self.federation}.leader"

    @property
    def own(self) -> str:
        """What the queues begin with that somebody binds to broadcasts or events besides the parties: an evaluator, a dashboard,
        an archive."""
        return f"fl.{self.federation}.own."

    def own_of(self, reader: str) -> str:
        """What the queues of one such reader begin with, for whoever listens."""
        return f"{self.own}{reader}"

    def up(self, party: str) -> str:
        return f"fl.{self.federation}.up.{party}"

    def inbox(self, party: str) -> str:
        return f"fl.{self.federation}.inbox.{party}"

    def party_of(self, exchange: str) -> str | None:
        """The party whose exchange this is; None where it is no party's."""
        prefix = f"fl.{self.federation}.up."
        return exchange.removeprefix(prefix) if exchange.startswith(prefix) else None


def leadership(federation: str) -> Topology:
    """What aggregators need before one of them leads; all else is declared by the one that does."""
    names = Names(federation)
    return Topology(
        exchanges=(Exchange(names.leader, "fanout"),),
        queues=(Queue(names.leader, "quorum", {"x-single-active-consumer": True, "x-max-length": MOST_TOKENS}),),
        bindings=(Binding(names.leader, names.leader),),
    )


def shared(federation: str) -> Topology:
    """What all parties share."""
    names = Names(federation)
    logs = Topology(
        queues=(Queue(names.model_log, "stream"), Queue(names.keyframe_log, "stream")),
        bindings=(Binding(names.model, names.model_log), Binding(names.keyframes, names.keyframe_log)),
    )
    without = shared_without_logs(federation)
    return Topology(without.exchanges, without.queues + logs.queues, without.bindings + logs.bindings)


def shared_without_logs(federation: str) -> Topology:
    """What enrolment needs. The logs are left to the aggregator, which makes the policies first: the size of a log's segments is
    fixed when the log is made, and only whole segments are ever dropped."""
    names = Names(federation)
    return Topology(
        exchanges=(
            Exchange(names.model, "fanout"),
            Exchange(names.keyframes, "fanout"),
            Exchange(names.receipts, "direct"),
            Exchange(names.events, "topic"),
            Exchange(names.quarantine, "fanout"),
        ),
        queues=(
            Queue(names.updates, "quorum", {"x-single-active-consumer": True, "x-dead-letter-exchange": names.quarantine}),
            Queue(names.quarantine, "classic"),
        ),
        bindings=(Binding(names.quarantine, names.quarantine),),
    )


def policies(federation: str, *, model_bytes: int) -> tuple[Policy, ...]:
    """What an operator may change while it runs.

    The keyframe log keeps the last few whole models, of `model_bytes` each, and the model log about as many bytes of changes as
    eight models: nobody takes more of them than that.
    """
    prefix = "^" + re.escape(f"fl.{federation}.")
    segment_bytes = max(model_bytes, MIB)
    day_ms = 24 * 3600 * 1000
    definitions: dict[str, tuple[str, dict[str, Argument]]] = {
        # Full, it refuses: senders come again. One that dropped its oldest would have them all sent again.
        "updates": ("updates$", {"delivery-limit": 5, "max-length-bytes": MOST_WAITING_BYTES, "overflow": "reject-publish"}),
        "model.log": (
            r"model\.log$",
            {"max-length-bytes": 8 * segment_bytes, "stream-max-segment-size-bytes": segment_bytes},
        ),
        "keyframes.log": (
            r"keyframes\.log$",
            {"max-length-bytes": 4 * segment_bytes, "stream-max-segment-size-bytes": segment_bytes},
        ),
        "quarantine": ("quarantine$", {"message-ttl": 7 * day_ms, "max-length-bytes": 256 * MIB, "overflow": "drop-head"}),
        "inbox": (r"inbox\.", {"message-ttl": 30 * day_ms, "max-length": 10_000, "overflow": "drop-head"}),
    }
    return tuple(
        Policy(f"fl.{federation}.{name}", prefix + pattern, "queues", definition)
        for name, (pattern, definition) in definitions.items()
    )


def policies_without_logs(federation: str) -> tuple[Policy, ...]:
    """Those that need to know no model: what enrolment makes, since parties may send before there is an aggregator."""
    return tuple(policy for policy in policies(federation, model_bytes=0) if not policy.name.endswith(".log"))


def party(federation: str, name: str) -> Topology:
    """What is one party's own: its way up, and the inbox for its receipts."""
    names = Names(federation)
    return Topology(
        exchanges=(Exchange(names.up(name), "fanout"),),
        queues=(Queue(names.inbox(name), "classic"),),
        bindings=(
            Binding(names.up(name), names.updates),
            Binding(names.receipts, names.inbox(name), routing_key=name),
        ),
    )


def party_permissions(federation: str, name: str) -> Permissions:
    """Configure nothing; write only its own exchange; read only the two logs of the model and its own inbox."""
    names = Names(federation)
    readable = "|".join(re.escape(queue) for queue in (names.model_log, names.keyframe_log, names.inbox(name)))
    return Permissions(configure="^$", write=f"^{re.escape(names.up(name))}$", read=f"^({readable})$")


def aggregator_permissions(federation: str) -> Permissions:
    """All that is the federation's."""
    own = f"^{re.escape(f'fl.{federation}.')}"
    return Permissions(configure=own, write=own, read=own)


def evaluator_permissions(federation: str) -> Permissions:
    """Reads what is broadcast, through a queue of its own, and tells of it by events; nothing else."""
    names = Names(federation)
    readable = "|".join(
        re.escape(name) for name in (names.model, names.keyframes, names.model_log, names.keyframe_log, names.events)
    )
    own = rf"{re.escape(names.own_of(EVALUATOR))}\..*"
    return Permissions(
        configure=f"^{own}$",
        write=f"^({own}|{re.escape(names.events)})$",
        read=f"^({own}|{readable})$",
    )


def operator_policies(federation: str, inbox: InboxLimits | None = None) -> tuple[Policy, ...]:
    """What no other policy may exceed: neither updates that nobody takes, nor receipts and broadcasts that nobody reads, may fill
    the broker's disk, which would stop everybody.

    Operator policies know no `overflow`: it is the policy of the same queue that has the updates refused, and not dropped.
    """
    inbox = inbox or InboxLimits()
    prefix = "^" + re.escape(f"fl.{federation}.")
    definitions: dict[str, tuple[str, dict[str, Argument]]] = {
        "updates": ("updates$", {"max-length-bytes": MOST_WAITING_BYTES}),
        "inbox": (
            r"inbox\.",
            {"message-ttl": 1000 * inbox.ttl_s, "max-length": inbox.messages, "max-length-bytes": inbox.bytes},
        ),
        "own": (r"own\.", {"expires": 1000 * OWN_EXPIRES_S, "max-length-bytes": MOST_OWN_BYTES}),
    }
    return tuple(
        Policy(f"fl.{federation}.{name}", prefix + pattern, "queues", definition)
        for name, (pattern, definition) in definitions.items()
    )


def party_limits(*, connections: int, channels: int) -> dict[str, int]:
    """User limits, as RabbitMQ has them: of what is open at a time."""
    return {"max-connections": connections, "max-channels": channels}
