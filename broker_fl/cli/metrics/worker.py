"""What a worker counts. docs/metrics.md says what each of it means."""

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from broker_fl.cli.metrics.labels import bytes_counter, codec_label
from schemas.receipt import Receipt

_OUTCOMES = ("merged", "buffered", "refused")
_TRAININGS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800, 3600, 14_400)


class WorkerMetrics:
    """An Observer of the worker."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._version = Gauge("broker_fl_worker_version", "Of the model that is held.", registry=registry)
        self._trainings = Counter("broker_fl_worker_trainings_total", "Local trainings that ended.", registry=registry)
        self._seconds = Histogram(
            "broker_fl_worker_training_seconds", "Of one local training.", registry=registry, buckets=_TRAININGS_S
        )
        self._updates = Counter("broker_fl_worker_updates_total", "Updates that were answered.", ["outcome"], registry=registry)
        for outcome in _OUTCOMES:
            self._updates.labels(outcome)
        self._bytes = bytes_counter(registry)
        self._epsilon = Gauge("broker_fl_worker_epsilon", "What all trainings on the data have cost, by RDP.", registry=registry)
        self._unsettled = Gauge("broker_fl_worker_unsettled_updates", "Updates without an answer.", registry=registry)
        self._connected = Gauge("broker_fl_worker_connected", "1 while there is a connection.", registry=registry)
        for unknown in (self._version, self._epsilon):
            unknown.set(math.nan)

    def connected(self, is_connected: bool) -> None:
        self._connected.set(is_connected)

    def has_version(self, version: int) -> None:
        self._version.set(version)

    def read(self, codec: str, size: int) -> None:
        self._bytes.labels("down", codec_label(codec)).inc(size)

    def trained(self, seconds: float) -> None:
        self._trainings.inc()
        self._seconds.observe(seconds)

    def sent(self, codec: str, size: int) -> None:
        self._bytes.labels("up", codec_label(codec)).inc(size)

    def settled(self, receipt: Receipt) -> None:
        self._updates.labels(receipt.outcome).inc()

    def has_unsettled(self, updates: int) -> None:
        self._unsettled.set(updates)

    def has_spent(self, epsilon: float) -> None:
        self._epsilon.set(epsilon)
