"""All merging strategies by name."""

from collections.abc import Callable

from aggregator.merging.buffered import fedavg, fedbuff
from aggregator.merging.fold import Strategy
from aggregator.merging.immediate import FedAsync
from broker_fl.config import MergingSettings

STRATEGIES: dict[str, Callable[[MergingSettings], Strategy]] = {
    "fedasync": FedAsync,
    "fedbuff": fedbuff,
    "fedavg": fedavg,
}


def build_strategy(settings: MergingSettings) -> Strategy:
    return STRATEGIES[settings.strategy](settings)
