"""Values of labels, kept few whatever others say."""

from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter

from broker_fl.codecs.codec import parse_codec
from broker_fl.errors import ConfigurationError

OTHER = "other"
"""Of what was in no codec that we know."""

MOST_PARTIES = 10_000
"""That have a series of their own, or are counted as online."""


@lru_cache(maxsize=256)
def codec_label(name: str) -> str:
    """A codec without its numbers: topk+int4 for topk:0.01+int4. There are some fifty of them."""
    try:
        codec = parse_codec(name)
    except ConfigurationError:
        return OTHER
    return codec.quantizer.kind if codec.sparsifier is None else f"{codec.sparsifier.kind}+{codec.quantizer.kind}"


def bytes_counter(registry: CollectorRegistry) -> Counter:
    """The same for aggregator and workers: up is towards the aggregator."""
    return Counter(
        "broker_fl_bytes_total", "Bytes of updates (up) and of broadcasts (down).", ["direction", "codec"], registry=registry
    )
