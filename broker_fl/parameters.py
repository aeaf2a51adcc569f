"""Named tensors and the one flat float32 vector that is merged, encoded and hashed."""

import hashlib
from collections.abc import Mapping

import blake3
import numpy as np
from numpy.typing import NDArray

from broker_fl.errors import ManifestMismatchError
from schemas.ids import Digest
from schemas.manifest import Manifest, TensorSpec

Vector = NDArray[np.float32]
"""A model, a delta or a residual: shape (n,), float32, contiguous."""


def manifest_of(tensors: Mapping[str, NDArray[np.float32]]) -> Manifest:
    """The layout of these tensors in their order; a scalar counts as shape (1,)."""
    specs = []
    offset = 0
    for name, tensor in tensors.items():
        specs.append(TensorSpec(name=name, shape=tensor.shape or (1,), offset=offset))
        offset += tensor.size
    return Manifest(tensors=tuple(specs))


def flatten(tensors: Mapping[str, NDArray[np.float32]], manifest: Manifest) -> Vector:
    """The vector, shape (manifest.size,), a copy. Raises ManifestMismatchError for other names or shapes."""
    if list(tensors) != [spec.name for spec in manifest.tensors]:
        raise ManifestMismatchError(mismatch(manifest_of(tensors), manifest))
    vector = np.empty(manifest.size, dtype=np.float32)
    for spec in manifest.tensors:
        tensor = tensors[spec.name]
        if (tensor.shape or (1,)) != spec.shape:
            raise ManifestMismatchError(mismatch(manifest_of(tensors), manifest))
        vector[spec.offset : spec.offset + spec.size] = tensor.reshape(-1)
    return vector


def unflatten(vector: Vector, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Views into the vector by name."""
    if vector.shape != (manifest.size,):
        raise ManifestMismatchError(f"a vector of this model has {manifest.size} elements, not {vector.size}")
    return {spec.name: vector[spec.offset : spec.offset + spec.size].reshape(spec.shape) for spec in manifest.tensors}


def digest(vector: Vector) -> Digest:
    """SHA-256 of the vector's little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).hexdigest()


def fingerprint(vector: Vector) -> Digest:
    """BLAKE3 (O'Connor et al. 2020) of the vector's little-endian bytes: for our own records, four times as fast as SHA-256."""
    return blake3.blake3(np.ascontiguousarray(vector, dtype="<f4").data.cast("B")).hexdigest()


def mismatch(ours: Manifest, theirs: Manifest) -> str:
    """One line that names the first difference between two layouts."""
    for mine, other in zip(ours.tensors, theirs.tensors, strict=False):
        if (mine.name, mine.shape) != (other.name, other.shape):
            return f"expected {other.name} {list(other.shape)}, this model has {mine.name} {list(mine.shape)}"
    return f"expected {len(theirs.tensors)} tensors, this model has {len(ours.tensors)}"
