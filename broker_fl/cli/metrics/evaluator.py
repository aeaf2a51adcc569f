"""What an evaluator counts. docs/metrics.md says what each of it means."""

import math

from prometheus_client import CollectorRegistry, Gauge, Histogram

from aggregator.evaluator import Score

_EVALUATIONS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)


class EvaluatorMetrics:
    """An Observer of the evaluator."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._version = Gauge("broker_fl_evaluated_version", "The version that was evaluated last.", registry=registry)
        self._accuracy = Gauge("broker_fl_accuracy", "Of that version, on held-out data, 0 to 1.", registry=registry)
        self._loss = Gauge("broker_fl_loss", "Of that version, on held-out data.", registry=registry)
        self._seconds = Histogram("broker_fl_evaluation_seconds", "Of one evaluation.", registry=registry, buckets=_EVALUATIONS_S)
        for unknown in (self._version, self._accuracy, self._loss):
            unknown.set(math.nan)

    def evaluated(self, version: int, score: Score, *, seconds: float) -> None:
        self._version.set(version)
        self._accuracy.set(score.accuracy)
        self._loss.set(score.loss)
        self._seconds.observe(max(0.0, seconds))
