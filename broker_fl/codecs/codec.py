"""The pipeline: sparsify, quantize, code the indices. One string names it everywhere: `topk:0.01+int4`, `int8`, `float32`.

A dense payload is the values of the whole vector. A sparse payload is the indices (see indices.py), then the values of the small
tensors, all of them and in order, then the values at the indices.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from broker_fl.codecs.delta import Delta
from broker_fl.codecs.indices import Indices, decode_indices, encode_indices
from broker_fl.codecs.quantize import FOR_SMALL_TENSORS, QUANTIZERS
from broker_fl.codecs.sparsify import top_k
from broker_fl.errors import ConfigurationError, DecodeError, nearest
from broker_fl.parameters import Vector
from schemas.manifest import Manifest

SMALL_TENSOR = 1024
"""Tensors of up to this many elements are sent whole: biases, normalisation, first layers."""

SPARSIFIERS = ("topk",)


@dataclass(frozen=True, slots=True)
class Codec:
    quantizer: str
    density: float | None = None
    """Share of the elements of large tensors that top-k sends; None for dense."""

    @property
    def name(self) -> str:
        return self.quantizer if self.density is None else f"topk:{self.density!r}+{self.quantizer}"


@lru_cache(maxsize=256)
def parse_codec(name: str) -> Codec:
    """`[topk:DENSITY+]QUANTIZER`. Raises ConfigurationError with the nearest right name."""
    sparsifier, _, quantizer = name.rpartition("+")
    if quantizer not in QUANTIZERS:
        raise ConfigurationError(f"unknown quantizer {quantizer!r} in codec {name!r}: {nearest(quantizer, QUANTIZERS)}")
    if not sparsifier:
        if "+" in name:
            raise ConfigurationError(f"codec {name!r} names no sparsifier before '+': expected topk:DENSITY")
        return Codec(quantizer)
    kind, _, argument = sparsifier.partition(":")
    if kind not in SPARSIFIERS:
        raise ConfigurationError(f"unknown sparsifier {kind!r} in codec {name!r}: {nearest(kind, SPARSIFIERS)}")
    try:
        density = float(argument)
    except ValueError as exc:
        raise ConfigurationError(f"codec {name!r}: the density of top-k must be a number, as in topk:0.01") from exc
    if not 0 < density <= 1:
        raise ConfigurationError(f"codec {name!r}: the density of top-k must be over 0 and at most 1, not {argument}")
    return Codec(quantizer, density)


def encode(vector: Vector, codec: Codec, *, manifest: Manifest, generator: np.random.Generator) -> bytes:
    """The payload of a finite float32 vector, shape (manifest.size,). The generator drives stochastic rounding."""
    quantizer = QUANTIZERS[codec.quantizer]
    if codec.density is None:
        return quantizer.encode(vector, generator)
    small = _small_positions(manifest)
    magnitudes = np.abs(vector)
    magnitudes[small] = -1
    large = manifest.size - small.size
    indices = top_k(magnitudes, min(large, max(1, round(codec.density * large))))
    small_quantizer = QUANTIZERS[FOR_SMALL_TENSORS[codec.quantizer]]
    return b"".join(
        [
            encode_indices(indices),
            small_quantizer.encode(vector[small], generator),
            quantizer.encode(vector[indices], generator),
        ]
    )


def decode(payload: bytes, codec: Codec, *, manifest: Manifest) -> Delta:
    """What `encode` sent. Raises DecodeError for a payload that is not exactly one encoding for this manifest."""
    quantizer = QUANTIZERS[codec.quantizer]
    if codec.density is None:
        _expect_length(payload, quantizer.length(manifest.size))
        return Delta(manifest.size, quantizer.decode(payload, manifest.size))
    sparse = decode_indices(payload, size=manifest.size)
    small = _small_positions(manifest)
    _expect_apart(sparse.indices, small)
    small_quantizer = QUANTIZERS[FOR_SMALL_TENSORS[codec.quantizer]]
    split = sparse.end + small_quantizer.length(small.size)
    _expect_length(payload, split + quantizer.length(sparse.indices.size))
    values = np.concatenate(
        [
            small_quantizer.decode(payload[sparse.end : split], small.size),
            quantizer.decode(payload[split:], sparse.indices.size),
        ]
    )
    return Delta(manifest.size, values, np.concatenate([small, sparse.indices]))


def _expect_length(payload: bytes, expected: int) -> None:
    if len(payload) != expected:
        raise DecodeError(f"the payload should have {expected} bytes, not {len(payload)}")


def _expect_apart(indices: Indices, small: Indices) -> None:
    """Both ascend. An element that came twice would be added once and counted twice."""
    at = np.searchsorted(indices, small)
    found = at < indices.size
    if np.any(indices[at[found]] == small[found]):
        raise DecodeError("an index lies in a small tensor, which is sent whole")


@lru_cache(maxsize=8)
def _positions(spans: tuple[tuple[int, int], ...]) -> Indices:
    if not spans:
        return np.empty(0, dtype=np.int64)
    positions = np.concatenate([np.arange(start, end) for start, end in spans])
    positions.flags.writeable = False
    return positions


def _small_positions(manifest: Manifest) -> Indices:
    return _positions(tuple((spec.offset, spec.offset + spec.size) for spec in manifest.tensors if spec.size <= SMALL_TENSOR))
