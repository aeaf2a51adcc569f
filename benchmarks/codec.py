"""What each codec sends and what it costs, beside information theory and the naive way, in one run on one thread.

The delta is a made-up one of a realistic model: convolutions of growing width with their norms and biases, and one large layer;
heavy-tailed, at a scale of each tensor and each row. The **naive way** is torch.topk of the magnitudes of the whole vector, then
indices as uint32 and values as float32; for dense codecs (density 1), the vector's own bytes. zstd is at level 3 over that. A
**dense merge** decodes a whole float32 vector and adds it, scaled, to a model; decode_merge_s is that for the codec's payload.

- index_bits_ratio: bytes of the indices, headers included, / log2 C(n, k), of k out of the n elements of large tensors. What
  treats all choices alike cannot get below 1; what adapts to a model whose tensors are chosen from unevenly may.
  index_by_tensor_ratio has the sum of log2 C(n, k) over the large tensors instead: the limit for who is told how many come from
  each. None where no indices are sent: dense, and masks from a shared seed.
- value_bits_ratio: all other bytes (scales, seeds and histograms too) / the empirical order-0 entropy of the codes that were
  sent, those of small tensors apart; for floats, their bits.

Times are medians of rounds after one that does not count, in which what is compared takes turns: encoding and the naive way, then
decoding, merging and the dense merge.

    python -m benchmarks.codec [--json FILE] [--parameters N ...] [--densities D ...] [--codecs NAME ...]
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import zstandard

from benchmarks.report import parser, show
from broker_fl.codecs import quantize, rotation
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.entropy import Symbols, encode_symbols
from broker_fl.codecs.indices import entropy_bits_per_index
from broker_fl.codecs.layout import layout_of
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.registry import SPARSIFIERS
from broker_fl.parameters import Vector, manifest_of
from schemas.manifest import Manifest

PARAMETERS = (1_000_000, 11_000_000, 25_000_000)
DENSITIES = (0.001, 0.01, 0.05)
QUANTIZERS = ("float32", "float16", "bfloat16", "int8", "int4", "ternary", "stc", "sign", "qsgd:4", "eden:1", "eden:4")
WITH = "int4"
"""Top-k comes with every quantizer, the other sparsifiers with this one."""
MERGE_RATE = 0.3
ROUNDS = 5
BUDGET_S = 0.5
"""Of one comparison: what is slow gets fewer rounds."""

BESIDE = ("naive_bytes", "naive_encode_s", "zstd_bytes", "zstd_encode_s", "dense_merge_s")
"""Columns that are the same, but for noise, in all rows of a size and density."""

INDEX_GOAL, ENCODE_GOAL, MERGE_GOAL = 1.02, 5.0, 5.0
GOAL_PARAMETERS, GOAL_DENSITY = 11_000_000, 0.01


@dataclass(frozen=True, slots=True)
class Row:
    parameters: int
    density: float
    """What the codec's name asks for; of dense codecs, 1."""
    codec: str
    bytes: int
    index_bits_ratio: float | None
    index_by_tensor_ratio: float | None
    value_bits_ratio: float
    encode_s: float
    decode_s: float
    decode_merge_s: float
    naive_encode_s: float
    naive_bytes: int
    zstd_encode_s: float
    """The naive way's time included."""
    zstd_bytes: int
    dense_merge_s: float
    encode_speedup: float
    """Over the naive way."""
    merge_speedup: float
    """Over the dense merge."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What all codecs of a size and density are beside."""

    parameters: int
    density: float
    naive_bytes: int
    naive_encode_s: float
    zstd_bytes: int
    zstd_encode_s: float
    dense_merge_s: float


@dataclass(frozen=True, slots=True)
class Naive:
    bytes: int
    zstd_bytes: int
    zstd_s: float
    """Without the naive way's own time."""


@dataclass(frozen=True, slots=True)
class Indices:
    """What the choice of elements takes in a payload."""

    bytes: int
    ratio: float | None
    by_tensor_ratio: float | None


def model(parameters: int) -> Manifest:
    """Convolutions that double their width until they hold a third of the parameters, norms and biases, and one large layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    count, width, before = 0, 32, 3
    while count + 9 * width * before + 2 * width < parameters // 3:
        block = {"conv.weight": (width, before, 3, 3), "norm.weight": (width,), "norm.bias": (width,)}
        shapes |= {f"block{width}.{name}": shape for name, shape in block.items()}
        count += 9 * width * before + 2 * width
        width, before = 2 * width, width
    columns = 512
    rows = (parameters - count - 1) // (columns + 1)
    shapes |= {"hidden.weight": (rows, columns), "hidden.bias": (rows,)}
    shapes["out.bias"] = (parameters - count - rows * (columns + 1),)
    return manifest_of({name: np.empty(shape, np.float32) for name, shape in shapes.items()})


def delta(manifest: Manifest, *, seed: int = 1) -> Vector:
    """Products of two normal variables (kurtosis 9); tensors at scales over a decade, rows from a log-normal around those."""
    generator = np.random.default_rng(seed)
    vector = generator.standard_normal(manifest.size, dtype=np.float32)
    vector *= generator.standard_normal(manifest.size, dtype=np.float32)
    for tensor in manifest.tensors:
        rows = vector[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape[0], -1)
        rows *= np.float32(10 ** generator.uniform(-3.5, -2.5))
        rows *= generator.lognormal(sigma=0.5, size=(tensor.shape[0], 1)).astype(np.float32)
    return vector


def seconds(*works: Callable[[], object]) -> list[float]:
    """Of each, the median over rounds in which they take turns."""
    rounds: list[list[float]] = []
    while len(rounds) < 2 or (len(rounds) <= ROUNDS and sum(map(sum, rounds)) < BUDGET_S):
        rounds.append([])
        for work in works:
            began = time.perf_counter()
            work()
            rounds[-1].append(time.perf_counter() - began)
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def naive_payload(vector: Vector, density: float) -> bytes:
    if density == 1:
        return vector.tobytes()
    tensor = torch.from_numpy(vector)
    chosen = torch.topk(tensor.abs(), max(1, round(density * vector.size)), sorted=False).indices
    return chosen.numpy().astype("<u4").tobytes() + tensor[chosen].numpy().tobytes()


def naive(vector: Vector, density: float) -> Naive:
    compressor = zstandard.ZstdCompressor(level=3)
    payload = naive_payload(vector, density)
    (zstd_s,) = seconds(lambda: compressor.compress(payload))
    return Naive(len(payload), len(compressor.compress(payload)), zstd_s)


def indices_of(payload: bytes, codec: str, manifest: Manifest) -> Indices:
    layout, sparsifier = layout_of(manifest), parse_codec(codec).sparsifier
    if sparsifier is None or sparsifier.kind == "randomk":
        return Indices(0, None, None)
    reader = Reader(payload)
    ranks = SPARSIFIERS[sparsifier.kind].sparsifier.decode(reader, layout, sparsifier.argument or 0)
    sizes = [end - start for start, end in layout.large_tensors]
    counts = np.diff(np.searchsorted(ranks, np.cumsum([0, *sizes])))
    by_tensor = sum(_choice_bits(size, int(count)) for size, count in zip(sizes, counts, strict=True))
    return Indices(reader.at, 8 * reader.at / _choice_bits(layout.large, ranks.size), 8 * reader.at / by_tensor)


def _choice_bits(size: int, count: int) -> float:
    return count * entropy_bits_per_index(size=size, count=count) if count else 0.0


def symbols_of(vector: Vector, codec: str, manifest: Manifest) -> list[Symbols]:
    """The codes that quantizers hand to the entropy stage; none for floats."""
    seen: list[Symbols] = []

    def listening(symbols: Symbols, *, alphabet: int) -> bytes:
        seen.append(symbols)
        return encode_symbols(symbols, alphabet=alphabet)

    # What no caller needs to know has no other door.
    with mock.patch.object(quantize, "encode_symbols", listening), mock.patch.object(rotation, "encode_symbols", listening):
        encoded(vector, codec, manifest)
    return seen


def entropy_bits(symbols: Symbols) -> float:
    """Order 0, empirical, of all of them."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(np.dot(counts, np.log2(symbols.size / counts)))


def encoded(vector: Vector, codec: str, manifest: Manifest) -> bytes:
    return encode(vector, parse_codec(codec), manifest=manifest, generator=np.random.default_rng(2))


def measured(vector: Vector, codec: str, manifest: Manifest, *, density: float, beside: Naive, dense_payload: bytes) -> Row:
    parsed, dense = parse_codec(codec), parse_codec("float32")
    payload = encoded(vector, codec, manifest)
    indices = indices_of(payload, codec, manifest)
    value_bits = 8 * (len(payload) - indices.bytes)
    limit = sum(entropy_bits(symbols) for symbols in symbols_of(vector, codec, manifest)) or value_bits
    merged = np.zeros(manifest.size, np.float32)
    encode_s, naive_s = seconds(lambda: encoded(vector, codec, manifest), lambda: naive_payload(vector, density))
    decode_s, decode_merge_s, dense_merge_s = seconds(
        lambda: decode(payload, parsed, manifest=manifest),
        lambda: decode(payload, parsed, manifest=manifest).add_to(merged, MERGE_RATE),
        lambda: decode(dense_payload, dense, manifest=manifest).add_to(merged, MERGE_RATE),
    )
    return Row(
        parameters=manifest.size,
        density=density,
        codec=codec,
        bytes=len(payload),
        index_bits_ratio=indices.ratio,
        index_by_tensor_ratio=indices.by_tensor_ratio,
        value_bits_ratio=value_bits / limit,
        encode_s=encode_s,
        decode_s=decode_s,
        decode_merge_s=decode_merge_s,
        naive_encode_s=naive_s,
        naive_bytes=beside.bytes,
        zstd_encode_s=naive_s + beside.zstd_s,
        zstd_bytes=beside.zstd_bytes,
        dense_merge_s=dense_merge_s,
        encode_speedup=naive_s / encode_s,
        merge_speedup=dense_merge_s / decode_merge_s,
    )


def codecs_of(density: float, vector: Vector) -> list[str]:
    if density == 1:
        return list(QUANTIZERS)
    others = (f"topk-per-tensor:{density}", f"randomk:{density}", f"threshold:{threshold(vector, density):.6g}")
    return [f"topk:{density}+{quantizer}" for quantizer in QUANTIZERS] + [f"{other}+{WITH}" for other in others]


def threshold(vector: Vector, density: float) -> float:
    """The magnitude that a share of `density` exceeds."""
    at = round((1 - density) * (vector.size - 1))
    return float(np.partition(np.abs(vector), at)[at])


def measure(parameters: Sequence[int], densities: Sequence[float], codecs: Sequence[str] | None) -> Iterator[Row]:
    for size in parameters:
        manifest = model(size)
        vector = delta(manifest)
        dense_payload = encoded(vector, "float32", manifest)
        for density in densities:
            beside = naive(vector, density)
            for codec in codecs_of(density, vector):
                if codecs is None or any(codec.endswith(name) for name in codecs):
                    yield measured(vector, codec, manifest, density=density, beside=beside, dense_payload=dense_payload)


def besides(rows: Sequence[Row]) -> list[Beside]:
    """Of each size and density, the medians over its rows."""
    return [
        Beside(*group, **{name: statistics.median(getattr(row, name) for row in there) for name in BESIDE})
        for group in dict.fromkeys((row.parameters, row.density) for row in rows)
        if (there := [row for row in rows if (row.parameters, row.density) == group])
    ]


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    rows: list[tuple[float, Row]]
    """With how many times better than the goal asks each is."""

    def __str__(self) -> str:
        margin, worst = min(self.rows, key=lambda scored: scored[0])
        holding = sum(margin >= 1 for margin, _ in self.rows)
        verdict = "holds:" if holding == len(self.rows) else "FAILS:"
        where = f"{worst.codec} at {worst.parameters:,} parameters, {margin:.3f} of what it should be"
        return f"{verdict} {holding} of {len(self.rows)} rows: {self.text} (worst: {where})"


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Those of which there are rows."""
    there = [row for row in rows if (row.parameters, row.density) == (GOAL_PARAMETERS, GOAL_DENSITY)]
    where = f"at {GOAL_DENSITY:.0%}, {GOAL_PARAMETERS:,} parameters"
    every = [
        Goal(
            f"index bits <= {INDEX_GOAL} x limit at every density",
            [(INDEX_GOAL / row.index_bits_ratio, row) for row in rows if row.index_bits_ratio is not None],
        ),
        Goal(
            f"encode {where} >= {ENCODE_GOAL:g} x faster than the naive way",
            [(row.encode_speedup / ENCODE_GOAL, row) for row in there],
        ),
        Goal(
            f"decode-and-merge {where} >= {MERGE_GOAL:g} x faster than a dense merge",
            [(row.merge_speedup / MERGE_GOAL, row) for row in there],
        ),
    ]
    return [goal for goal in every if goal.rows]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--parameters", type=int, nargs="+", default=PARAMETERS)
    arguments.add_argument("--densities", type=float, nargs="+", default=(*DENSITIES, 1.0), help="1 is dense")
    arguments.add_argument("--codecs", nargs="+", help="only those whose names end so, as in int4")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(given.parameters, given.densities, given.codecs))
    show("Codecs, one thread", rows, json_file=given.json, hidden=(*BESIDE, "decode_s"))
    show("Beside them", besides(rows), json_file=None)
    for goal in goals(rows):
        print(goal)


if __name__ == "__main__":
    main()
