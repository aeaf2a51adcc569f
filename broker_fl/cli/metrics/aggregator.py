"""What an aggregator counts. docs/metrics.md says what each of it means."""

import math
from collections.abc import Callable, Sequence
from threading import Lock
from time import monotonic
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from aggregator.records import FrameRow
from broker_fl.cli.metrics.labels import MOST_PARTIES, bytes_counter, codec_label
from schemas.event import UpdateFacts
from schemas.receipt import Reason

ONLINE_S = 300.0
"""How long a party that sent an update counts as online."""

_OUTCOMES = ("merged", "buffered", "refused", "duplicate")
_WEIGH_LESS = ("norm", "direction", "tier")
"""Reasons for which nothing is refused."""

_STALENESS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 10, 100, 1000, 10_000, 100_000)
_COMMITS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BROADCASTS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1800, 7200, 86_400, 604_800)


class AggregatorMetrics:
    """An Observer of the aggregator."""

    def __init__(self, *, clock: Callable[[], float] = monotonic, most_parties: int = MOST_PARTIES) -> None:
        self.registry = registry = CollectorRegistry()
        self._parties = _Parties(clock=clock, most=most_parties)
        self._version = Gauge("broker_fl_version", "Of the model.", registry=registry)
        self._version.set(math.nan)
        self._leading = Gauge("broker_fl_leading", "1 while this aggregator leads, and has a broker.", registry=registry)
        self._updates = Counter("broker_fl_updates_total", "Updates by what became of them.", ["outcome"], registry=registry)
        self._refusals = Counter("broker_fl_refusals_total", "Refused updates by reason.", ["reason"], registry=registry)
        # All of them from the start: a rate needs a 0 to rise from.
        for outcome in _OUTCOMES:
            self._updates.labels(outcome)
        for reason in get_args(Reason):
            if reason not in _WEIGH_LESS:
                self._refusals.labels(reason)
        self._suspensions = Counter(
            "broker_fl_suspensions_total", "Parties that the aggregator suspended by itself.", registry=registry
        )
        self._staleness = Histogram(
            "broker_fl_staleness_versions", "Of updates that were taken.", registry=registry, buckets=_STALENESS
        )
        self._weight = Histogram(
            "broker_fl_effective_weight", "What deltas were multiplied by.", registry=registry, buckets=_WEIGHTS
        )
        self._bytes = bytes_counter(registry)
        self._commits = Histogram(
            "broker_fl_commit_seconds",
            "From the decision about a group of updates to its commit.",
            registry=registry,
            buckets=_COMMITS_S,
        )
        self._broadcasts = Histogram(
            "broker_fl_broadcast_seconds",
            "From a frame's making to the broker's confirmation.",
            registry=registry,
            buckets=_BROADCASTS_S,
        )
        self._waits = Histogram(
            "broker_fl_queue_age_seconds", "From sending an update to its decision.", registry=registry, buckets=_WAITS_S
        )
        online = Gauge("broker_fl_parties_online", "Parties that sent an update within 5 minutes.", registry=registry)
        online.set_function(self._parties.online)
        self._epsilons = Gauge(
            "broker_fl_party_epsilon", "What a party's updates have cost it, by RDP.", ["party"], registry=registry
        )
        self._untold = Counter(
            "broker_fl_parties_left_out_total", "Updates of parties beyond those that are counted by name.", registry=registry
        )

    def leads(self, is_leading: bool) -> None:
        self._leading.set(is_leading)

    def has_version(self, version: int) -> None:
        self._version.set(version)

    def decided(self, updates: Sequence[UpdateFacts], *, waits_s: Sequence[float], seconds: float, suspensions: int) -> None:
        self._commits.observe(seconds)
        self._suspensions.inc(suspensions)
        for waited_s in waits_s:
            self._waits.observe(waited_s)
        for update in updates:
            self._count(update)

    def published(self, frame: FrameRow, *, seconds: float | None) -> None:
        if frame.keyframe is not None:
            self._bytes.labels("down", codec_label(frame.keyframe_codec or "")).inc(len(frame.keyframe))
        self._bytes.labels("down", codec_label(frame.codec)).inc(frame.size)
        if seconds is not None:
            self._broadcasts.observe(seconds)

    def _count(self, update: UpdateFacts) -> None:
        self._updates.labels(update.outcome).inc()
        self._bytes.labels("up", codec_label(update.codec)).inc(update.bytes)
        if update.outcome == "refused" and update.reason is not None:
            self._refusals.labels(update.reason).inc()
        if update.outcome in ("merged", "buffered"):
            self._staleness.observe(update.staleness)
            self._weight.observe(update.weight)
        if update.party is None:
            return
        if not self._parties.hear(update.party):
            self._untold.inc()
        elif update.epsilon is not None:
            self._epsilons.labels(update.party).set(update.epsilon)


class _Parties:
    """When each one was last heard of. Once there are too many, new ones are not taken."""

    def __init__(self, *, clock: Callable[[], float], most: int) -> None:
        self._clock = clock
        self._most = most
        self._heard_at: dict[str, float] = {}
        self._lock = Lock()
        """Who asks is in another thread."""

    def hear(self, party: str) -> bool:
        """Whether it is one of those that are counted."""
        with self._lock:
            if party not in self._heard_at and len(self._heard_at) >= self._most:
                return False
            self._heard_at[party] = self._clock()
        return True

    def online(self) -> float:
        since = self._clock() - ONLINE_S
        with self._lock:
            return sum(heard_at >= since for heard_at in self._heard_at.values())
