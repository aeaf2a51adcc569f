"""The pipeline: sparsify, quantize, code. One string names it everywhere: `topk:0.01+int4`, `randomk:0.05+qsgd:16`, `float32`.

A payload is the choice of elements of large tensors (indices.py, or a seed), then the values of the small tensors, all of them
and in order, then the values that were chosen. Without a sparsifier all are chosen; where small tensors need no other quantizer,
a dense payload is just the values of the whole vector.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from broker_fl.codecs.delta import Delta
from broker_fl.codecs.layout import SMALL_TENSOR, Layout, layout_of
from broker_fl.codecs.quantize import Quantizer
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from broker_fl.errors import ConfigurationError, ManifestMismatchError, nearest
from broker_fl.parameters import Vector
from schemas.manifest import Manifest

__all__ = ["SMALL_TENSOR", "Codec", "Stage", "decode", "encode", "parse_codec"]

MAX_NAME = 64
"""Characters, as the schemas have it."""

_NUMBER = re.compile(r"[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?|[0-9]+\.")
_INTEGER = re.compile(r"[1-9][0-9]{0,3}")
_SMALLEST, _LARGEST = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a codec's name: `topk:0.01`, `int4`, `eden:2`."""

    kind: str
    argument: float | int | None = None

    @property
    def name(self) -> str:
        return self.kind if self.argument is None else f"{self.kind}:{self.argument!r}"


@dataclass(frozen=True, slots=True)
class Codec:
    quantizer: Stage
    sparsifier: Stage | None = None
    """None for dense."""

    @property
    def name(self) -> str:
        return self.quantizer.name if self.sparsifier is None else f"{self.sparsifier.name}+{self.quantizer.name}"

    @property
    def density(self) -> float | None:
        """The share of the elements of large tensors that are sent; None where nothing in the name says so."""
        if self.sparsifier is None or SPARSIFIERS[self.sparsifier.kind].argument != "density":
            return None
        return self.sparsifier.argument

    def with_density(self, density: float) -> "Codec":
        """Raises ConfigurationError for a codec whose sparsifier has no density, or that has none."""
        if self.sparsifier is None or self.density is None:
            known = ", ".join(entry.example for entry in SPARSIFIERS.values() if entry.argument == "density")
            raise ConfigurationError(f"codec {self.name!r} has no density to set: name a sparsifier that has one ({known})")
        _check_argument("density", density, self.name)
        return replace(self, sparsifier=replace(self.sparsifier, argument=density))


@lru_cache(maxsize=256)
def parse_codec(name: str) -> Codec:
    """`[SPARSIFIER:ARGUMENT+]QUANTIZER[:ARGUMENT]`, see registry.py. Raises ConfigurationError with the nearest right name."""
    if len(name) > MAX_NAME:
        raise ConfigurationError(f"codec {name[:MAX_NAME]!r}...: a name has at most {MAX_NAME} characters, not {len(name)}")
    sparsifier, plus, quantizer = name.rpartition("+")
    if plus and not sparsifier:
        raise ConfigurationError(f"codec {name!r} names no sparsifier before '+': expected one like topk:0.01")
    stage = _quantizer_stage(quantizer, name)
    return Codec(stage, _sparsifier_stage(sparsifier, name) if plus else None)


def encode(vector: Vector, codec: Codec, *, manifest: Manifest, generator: np.random.Generator | None = None) -> bytes:
    """The payload of a finite float32 vector, shape (manifest.size,), which stays as it is.

    The generator drives stochastic rounding and draws seeds; without one, values are rounded to nearest, and a codec that needs a
    seed (randomk, eden) raises ConfigurationError. Raises ManifestMismatchError for another shape.
    """
    if vector.shape != (manifest.size,):
        raise ManifestMismatchError(f"a vector of this model has {manifest.size} elements, not {vector.size}")
    layout = layout_of(manifest)
    small, large = quantizers_of(codec)
    if codec.sparsifier is None and small is large:
        return large.encode(vector, generator)
    if codec.sparsifier is None:
        choice, values = b"", np.concatenate([vector[:0], *layout.large_parts(vector)])
    else:
        sparsifier = SPARSIFIERS[codec.sparsifier.kind].sparsifier
        choice, ranks = sparsifier.encode(vector, layout, codec.sparsifier.argument or 0, generator)
        values = vector[layout.positions(ranks)]
    return b"".join([choice, small.encode(vector[layout.small], generator), large.encode(values, generator)])


def decode(payload: bytes, codec: Codec, *, manifest: Manifest) -> Delta:
    """What `encode` sent. Raises DecodeError for a payload that is not exactly one encoding for this manifest.

    Memory is bounded by the payload and a few numbers for each element of the manifest, whatever the payload says.
    """
    reader = Reader(payload)
    delta = _decoded(reader, codec, layout_of(manifest))
    reader.finish()
    return delta


def _decoded(reader: Reader, codec: Codec, layout: Layout) -> Delta:
    small, large = quantizers_of(codec)
    if codec.sparsifier is None and small is large:
        return Delta(layout.size, large.decode(reader, layout.size))
    if codec.sparsifier is None:
        return Delta(layout.size, _assembled(small.decode(reader, layout.small.size), large.decode(reader, layout.large), layout))
    ranks = SPARSIFIERS[codec.sparsifier.kind].sparsifier.decode(reader, layout, codec.sparsifier.argument or 0)
    values = np.concatenate([small.decode(reader, layout.small.size), large.decode(reader, ranks.size)])
    return Delta(layout.size, values, np.concatenate([layout.small, layout.positions(ranks)]))


def _assembled(small: Vector, large: Vector, layout: Layout) -> Vector:
    vector = np.empty(layout.size, dtype=np.float32)
    vector[layout.small] = small
    first_rank = 0
    for part in layout.large_parts(vector):
        part[:] = large[first_rank : first_rank + part.size]
        first_rank += part.size
    return vector


@lru_cache(maxsize=64)
def _built(stage: Stage) -> Quantizer:
    return QUANTIZERS[stage.kind].build(int(stage.argument or 0))


def quantizers_of(codec: Codec) -> tuple[Quantizer, Quantizer]:
    """Of small tensors and of large ones; one object where there is no difference."""
    small, large = Stage(QUANTIZERS[codec.quantizer.kind].for_small), _built(codec.quantizer)
    # Asked for twice, it may come as two objects: a cache that several threads find empty gives each its own.
    return (large if small == codec.quantizer else _built(small)), large


def _sparsifier_stage(text: str, name: str) -> Stage:
    kind, _, argument = text.partition(":")
    if kind not in SPARSIFIERS:
        raise ConfigurationError(f"unknown sparsifier {kind!r} in codec {name!r}: {nearest(kind, SPARSIFIERS)}")
    entry = SPARSIFIERS[kind]
    if not _NUMBER.fullmatch(argument):
        raise ConfigurationError(f"codec {name!r}: the {entry.argument} of {kind} must be a number, as in {entry.example}")
    value = float(argument)
    _check_argument(entry.argument, value, name)
    return Stage(kind, value)


def _check_argument(what: Literal["density", "threshold"], value: float, name: str) -> None:
    if what == "density" and not 0 < value <= 1:
        raise ConfigurationError(f"codec {name!r}: a density must be over 0 and at most 1, not {value!r}")
    if what == "threshold" and not _SMALLEST <= value <= _LARGEST:
        raise ConfigurationError(f"codec {name!r}: a threshold must be a float32 over 0, not {value!r}")


def _quantizer_stage(text: str, name: str) -> Stage:
    kind, colon, argument = text.partition(":")
    if kind in SPARSIFIERS:
        raise ConfigurationError(
            f"codec {name!r} names no quantizer: expected one behind it, as in {SPARSIFIERS[kind].example}+int4"
        )
    if kind not in QUANTIZERS:
        raise ConfigurationError(f"unknown quantizer {kind!r} in codec {name!r}: {nearest(kind, QUANTIZERS)}")
    allowed = QUANTIZERS[kind].arguments
    if allowed is None:
        if colon:
            raise ConfigurationError(f"codec {name!r}: {kind} takes no argument, expected just {kind!r}")
        return Stage(kind)
    if not _INTEGER.fullmatch(argument) or int(argument) not in allowed:
        raise ConfigurationError(
            f"codec {name!r}: {kind} takes a number from {allowed[0]} to {allowed[-1]}, as in {kind}:{allowed[0]}"
        )
    return Stage(kind, int(argument))
