"""Codec names and layouts that the tests of this room share."""

import numpy as np

from broker_fl.codecs.codec import SMALL_TENSOR, decode, encode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.parameters import manifest_of
from schemas.manifest import Manifest

FLOATS = ["float32", "float16", "bfloat16"]
UNIFORM = {"int8": 127, "int4": 7, "ternary": 1}
SIGNS = ["sign", "stc"]
EDEN = ["eden:1", "eden:3"]
QUANTIZERS = [*FLOATS, *UNIFORM, "qsgd:16", *EDEN, *SIGNS]
SPARSIFIERS = ["topk:0.02", "topk-per-tensor:0.02", "randomk:0.05", "threshold:1.5"]
SPARSE = [f"{sparsifier}+{quantizer}" for sparsifier in SPARSIFIERS for quantizer in QUANTIZERS]
CODECS = [*QUANTIZERS, *SPARSE]


def layout(**sizes: int) -> Manifest:
    return manifest_of({name: np.zeros(size, np.float32) for name, size in sizes.items()})


MANIFESTS = {
    "small and large": layout(bias=10, weight=3000, norm=SMALL_TENSOR, next_weight=SMALL_TENSOR + 1, other=2000, last_bias=1),
    "only large": layout(weight=2000),
    "only small": layout(bias=5, norm=1000),
    "one parameter": layout(scale=1),
}
MIXED = MANIFESTS["small and large"]


def is_small(manifest: Manifest) -> np.ndarray:
    return np.concatenate([np.full(spec.size, spec.size <= SMALL_TENSOR) for spec in manifest.tensors])


def vector(manifest: Manifest, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=manifest.size).astype(np.float32)


def encoded(values: np.ndarray, codec: str, manifest: Manifest, seed: int = 1) -> bytes:
    return encode(values, parse_codec(codec), manifest=manifest, generator=np.random.default_rng(seed))


def decoded(payload: bytes, codec: str, manifest: Manifest) -> Delta:
    return decode(payload, parse_codec(codec), manifest=manifest)


def round_trip(values: np.ndarray, codec: str, manifest: Manifest, seed: int = 1) -> Delta:
    return decoded(encoded(values, codec, manifest, seed), codec, manifest)
