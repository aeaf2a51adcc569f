import hashlib
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker_fl.errors import ManifestMismatchError
from broker_fl.parameters import digest, flatten, manifest_of, mismatch, unflatten

PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
NAMED_TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=5), elements=st.floats(width=32, allow_nan=False)),
    min_size=1,
    max_size=5,
)


@PROPERTY
@given(tensors=NAMED_TENSORS)
def test_tensors_come_back_from_the_vector_to_the_last_bit(tensors):
    manifest = manifest_of(tensors)
    vector = flatten(tensors, manifest)
    assert vector.shape == (manifest.size,)
    assert vector.dtype == np.float32
    back = unflatten(vector, manifest)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == (tensor.shape or (1,))
        assert back[name].tobytes() == tensor.tobytes()


@PROPERTY
@given(tensors=NAMED_TENSORS)
def test_a_manifest_counts_every_element_once(tensors):
    manifest = manifest_of(tensors)
    assert manifest.size == sum(tensor.size for tensor in tensors.values())
    assert [spec.offset for spec in manifest.tensors] == [0, *np.cumsum([spec.size for spec in manifest.tensors])[:-1].tolist()]


def test_flattening_copies_and_unflattening_does_not():
    tensors = {"a": np.ones((2, 2), np.float32)}
    manifest = manifest_of(tensors)
    vector = flatten(tensors, manifest)
    vector[0] = 7
    assert tensors["a"][0, 0] == 1
    unflatten(vector, manifest)["a"][1, 1] = 9
    assert vector.tolist() == [7, 1, 1, 9]


def test_a_tensor_that_is_not_contiguous_is_read_in_its_own_order():
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    assert flatten(tensors, manifest_of(tensors)).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": (2,), "c": (3,)}, r"expected b \[3\], this model has c \[3\]"),
        ({"b": (3,), "a": (2,)}, r"expected a \[2\], this model has b \[3\]"),
        ({"a": (2,), "b": (3, 1)}, r"expected b \[3\], this model has b \[3, 1\]"),
        ({"a": (2,)}, "expected 2 tensors, this model has 1"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "expected 2 tensors, this model has 3"),
    ],
)
def test_another_layout_is_refused_with_its_first_difference(tensors, message):
    manifest = manifest_of({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    with pytest.raises(ManifestMismatchError, match=message):
        flatten({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, manifest)


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1), (1, 5), ()])
def test_a_vector_of_another_shape_is_refused(shape):
    manifest = manifest_of({"a": np.zeros(5, np.float32)})
    with pytest.raises(ManifestMismatchError, match="has 5 elements"):
        unflatten(np.zeros(shape, np.float32), manifest)


def test_the_digest_is_of_little_endian_float32():
    values = [0.0, -0.0, 1.5, -3.25, 1e-45]
    assert digest(np.array(values, np.float32)) == hashlib.sha256(struct.pack("<5f", *values)).hexdigest()


def test_the_digest_does_not_depend_on_byte_order_or_strides_in_memory():
    vector = np.arange(8, dtype=np.float32)
    assert digest(vector.astype(">f4")) == digest(vector)
    assert digest(np.repeat(vector, 2)[::2]) == digest(vector)


def test_the_digest_tells_every_bit():
    vector = np.zeros(3, np.float32)
    assert digest(vector) != digest(-vector)
    assert digest(vector) != digest(vector[:2])


def test_equal_layouts_have_no_difference_but_their_count():
    manifest = manifest_of({"a": np.zeros(2, np.float32)})
    assert mismatch(manifest, manifest) == "expected 1 tensors, this model has 1"
