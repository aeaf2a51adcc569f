"""All sparsifiers and quantizers. A codec's name is `[SPARSIFIER:ARGUMENT+]QUANTIZER[:ARGUMENT]`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from broker_fl.codecs.quantize import BFLOAT16, FLOAT16, FLOAT32, SIGN, STC, Quantizer, qsgd, uniform
from broker_fl.codecs.rotation import eden
from broker_fl.codecs.sparsify import RANDOM_K, THRESHOLD, TOP_K, TOP_K_PER_TENSOR, Sparsifier


@dataclass(frozen=True, slots=True)
class SparsifierEntry:
    sparsifier: Sparsifier
    argument: Literal["density", "threshold"]
    """A density is over 0 and at most 1, a threshold a float32 over 0, finite."""
    example: str
    by_magnitude: bool = False
    """Whether the choice looks at the values: after the noise of differential privacy, the largest values are noise."""


@dataclass(frozen=True, slots=True)
class QuantizerEntry:
    build: Callable[[int], Quantizer]
    """Called with the argument, 0 where there is none."""
    for_small: str
    """What small tensors are sent in: biases and normalisation statistics are few and matter, and never get fewer than 8 bits."""
    arguments: range | None = None
    is_unbiased: bool = False
    """Whether the mean of what is decoded is what was encoded, given a generator."""


SPARSIFIERS: dict[str, SparsifierEntry] = {
    "topk": SparsifierEntry(TOP_K, "density", "topk:0.01", by_magnitude=True),
    "topk-per-tensor": SparsifierEntry(TOP_K_PER_TENSOR, "density", "topk-per-tensor:0.01", by_magnitude=True),
    "randomk": SparsifierEntry(RANDOM_K, "density", "randomk:0.05"),
    "threshold": SparsifierEntry(THRESHOLD, "threshold", "threshold:0.001", by_magnitude=True),
}

QUANTIZERS: dict[str, QuantizerEntry] = {
    "float32": QuantizerEntry(lambda _: FLOAT32, "float32", is_unbiased=True),
    "float16": QuantizerEntry(lambda _: FLOAT16, "float16"),
    "bfloat16": QuantizerEntry(lambda _: BFLOAT16, "bfloat16"),
    "int8": QuantizerEntry(lambda _: uniform(127), "int8", is_unbiased=True),
    "int4": QuantizerEntry(lambda _: uniform(7), "int8", is_unbiased=True),
    "ternary": QuantizerEntry(lambda _: uniform(1), "int8", is_unbiased=True),
    "qsgd": QuantizerEntry(qsgd, "int8", arguments=range(1, 128), is_unbiased=True),
    "eden": QuantizerEntry(eden, "int8", arguments=range(1, 5), is_unbiased=True),
    "sign": QuantizerEntry(lambda _: SIGN, "int8"),
    "stc": QuantizerEntry(lambda _: STC, "int8"),
}
