"""All merging strategies by name."""

from collections.abc import Callable

from aggregator.merging.buffered import fedavg, fedbuff
from aggregator.merging.fold import Strategy
from aggregator.merging.immediate import FedAsync
from broker_fl.config import MergingSettings

STRATEGIES: dict[str, Callable[[MergingSettings, bytes], Strategy]] = {
    "fedasync": lambda settings, _: FedAsync(settings),
    "fedbuff": fedbuff,
    "fedavg": fedavg,
}


def build_strategy(settings: MergingSettings, *, noise_key: bytes = b"") -> Strategy:
    """The key is the ledger's; without it, a strategy that adds noise can be asked what it takes, and can merge nothing.

    Raises ValueError where such a one merges.
    """
    return STRATEGIES[settings.strategy](settings, noise_key)
