"""What Prometheus finds at the three endpoints: for the tests of what names these series."""

from prometheus_client import CollectorRegistry

from broker_fl.cli.metrics.aggregator import AggregatorMetrics
from broker_fl.cli.metrics.evaluator import EvaluatorMetrics
from broker_fl.cli.metrics.worker import WorkerMetrics

REGISTRIES = {
    "aggregator": AggregatorMetrics().registry,
    "worker": WorkerMetrics().registry,
    "evaluator": EvaluatorMetrics().registry,
}

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def series_of(registry: CollectorRegistry) -> set[str]:
    """The names of its series, whether or not there are any yet."""
    return {f"{family.name}{suffix}" for family in registry.collect() for suffix in SUFFIXES[family.type]}


METRIC_NAMES = frozenset().union(*map(series_of, REGISTRIES.values()))
"""Of all series, as a query names them: those of a histogram end in _bucket, _sum and _count."""


def values_of(registry: CollectorRegistry) -> dict[str, float]:
    """By name and labels as a query writes them, `name{label="value"}`, but for the birthdays of series."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return {name: value for name, value in found.items() if "_created" not in name}
