"""How much is sent: densities that fit into a number of bytes, and densities that fall while training warms up."""

import math

import numpy as np

from broker_fl.codecs.codec import Codec, encode, quantizers_of
from broker_fl.codecs.indices import entropy_bits_per_index
from broker_fl.codecs.layout import layout_of
from broker_fl.codecs.quantize import BLOCK, Quantizer
from broker_fl.codecs.sparsify import kept
from broker_fl.codecs.splitmix import SEED_BYTES
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import Vector
from schemas.manifest import Manifest

_DIGITS = 3
"""Of a density, so that names stay short."""
_SAMPLE = 16 * BLOCK
_HEADER_BYTES = 10
"""Of the numbers before the indices."""
_ATTEMPTS = 8
_MARGIN = 0.99


def fitted(codec: Codec, budget_bytes: int, *, manifest: Manifest) -> Codec:
    """The codec at the highest density, of three digits, whose payload should fit: higher or lower than its own.

    A dense codec stays as it is. Raises ConfigurationError where none fits, and for a sparsifier without a density.
    """
    if codec.sparsifier is None:
        _expect_fit(codec, modelled_bytes(codec, manifest=manifest), budget_bytes)
        return codec
    least = sparsest(codec, manifest=manifest)
    _expect_fit(least, modelled_bytes(least, manifest=manifest), budget_bytes)
    return _densest(codec, budget_bytes, manifest=manifest)


def encode_within(
    vector: Vector, codec: Codec, budget_bytes: int, *, manifest: Manifest, generator: np.random.Generator | None = None
) -> tuple[bytes, Codec]:
    """A payload of at most `budget_bytes`, and the codec that it is in: this one, or a lower density where that is too much.

    Raises ConfigurationError, which names the least possible size, where no density fits.
    """
    least = _least_density(manifest)
    for attempt in range(1, _ATTEMPTS + 1):
        payload = encode(vector, codec, manifest=manifest, generator=generator)
        if len(payload) <= budget_bytes or codec.density is None or codec.density <= least:
            break
        # The model is about as wrong at the next density as it was at this one.
        ratio = modelled_bytes(codec, manifest=manifest) / len(payload) * _MARGIN**attempt
        denser = _densest(codec, int(budget_bytes * ratio), manifest=manifest)
        codec = denser if attempt < _ATTEMPTS - 1 else sparsest(codec, manifest=manifest)
    _expect_fit(codec, len(payload), budget_bytes)
    return payload, codec


def sparsest(codec: Codec, *, manifest: Manifest) -> Codec:
    """The codec at a density that sends one element, of everything or of each tensor.

    Raises ConfigurationError for a codec without a density.
    """
    return codec.with_density(_least_density(manifest))


def warmed_up(codec: Codec, version: int, *, over_versions: int, from_density: float) -> Codec:
    """The codec at a density that falls exponentially from `from_density` at version 0 to its own at `over_versions`.

    Deep Gradient Compression's warm-up (Lin et al. 2018, section 3.3), where it falls from 25 % to 0.1 % over four epochs. Raises
    ConfigurationError for a codec without a density.
    """
    first = codec.with_density(from_density)
    if version >= over_versions or codec.density is None or codec.density >= from_density:
        return codec
    density = from_density * (codec.density / from_density) ** (version / over_versions)
    return first.with_density(max(codec.density, _shortened(density)))


def modelled_bytes(codec: Codec, *, manifest: Manifest) -> int:
    """The size of a payload of Laplace-distributed values that lie evenly over the vector.

    Raises ConfigurationError for a sparsifier without a density.
    """
    layout = layout_of(manifest)
    small, large = quantizers_of(codec)
    if codec.sparsifier is None:
        apart = [(small, layout.small.size), (large, layout.large)]
        return sum(_value_bytes(quantizer, count) for quantizer, count in ([(large, layout.size)] if small is large else apart))
    if codec.density is None:
        raise ConfigurationError(f"codec {codec.name!r}: how much passes a threshold is not known; a budget needs a density")
    if codec.sparsifier.kind == "topk-per-tensor":
        count = sum(kept(end - start, codec.density) for start, end in layout.large_tensors)
    else:
        count = kept(layout.large, codec.density)
    if codec.sparsifier.kind == "randomk":
        return SEED_BYTES + _value_bytes(small, layout.small.size) + _value_bytes(large, count)
    # What top-k leaves of exponential magnitudes is the same distribution, from a threshold on.
    least = math.log(layout.large / count) if count else 0
    indices = _index_bytes(layout.large, count)
    return indices + _value_bytes(small, layout.small.size) + _value_bytes(large, count, least=least)


def _index_bytes(size: int, count: int) -> int:
    limit = entropy_bits_per_index(size=size, count=count) * count if count else 0
    return _HEADER_BYTES + math.ceil(1.01 * limit / 8 + count / BLOCK)


def _value_bytes(quantizer: Quantizer, count: int, *, least: float = 0.0) -> int:
    """Of values whose magnitudes are `least` and something exponential."""
    drawn = np.random.default_rng(0)
    sample = min(count, _SAMPLE)
    magnitudes = drawn.standard_exponential(sample, dtype=np.float32) + np.float32(least)
    values = np.where(drawn.random(sample) < 0.5, -magnitudes, magnitudes)
    return math.ceil(len(quantizer.encode(values, drawn)) * max(count / max(sample, 1), 1))


def _densest(codec: Codec, budget_bytes: int, *, manifest: Manifest) -> Codec:
    """Of those whose model fits; the least dense where none does."""
    low, high = _least_density(manifest), 1.0
    if modelled_bytes(codec.with_density(high), manifest=manifest) <= budget_bytes:
        return codec.with_density(high)
    while high / low > 1 + 10**-_DIGITS / 2:
        middle = math.sqrt(low * high)
        if modelled_bytes(codec.with_density(middle), manifest=manifest) <= budget_bytes:
            low = middle
        else:
            high = middle
    return codec.with_density(_shortened(low))


def _least_density(manifest: Manifest) -> float:
    """A power of ten that keeps one element, of everything or of each tensor."""
    return float(f"1e{math.floor(math.log10(0.5 / manifest.size))}")


def _shortened(density: float) -> float:
    """Rounded down to three digits."""
    exponent = math.floor(math.log10(density)) + 1 - _DIGITS
    return float(f"{math.floor(density / 10.0**exponent * (1 + 1e-9))}e{exponent}")


def _expect_fit(codec: Codec, size: int, budget_bytes: int) -> None:
    if size <= budget_bytes:
        return
    if codec.density is None:
        way_out = "name a sparsifier, as in topk:0.01+int4" if codec.sparsifier is None else "name a sparsifier with a density"
        raise ConfigurationError(f"codec {codec.name!r} takes {size} bytes, the budget is {budget_bytes}: {way_out}")
    raise ConfigurationError(
        f"a budget of {budget_bytes} bytes is too small: {codec.sparsifier and codec.sparsifier.kind}"
        f"+{codec.quantizer.name} takes at least {size} bytes of this model"
    )
