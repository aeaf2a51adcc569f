import hashlib

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sample_messages import TWO_TENSORS, manifests

from schemas import wire
from schemas.errors import DecodeError
from schemas.manifest import MAX_PARAMETERS, Manifest, TensorSpec


def _manifest(*tensors: tuple[str, tuple[int, ...], int]) -> Manifest:
    return Manifest(tensors=tuple(TensorSpec(name=name, shape=shape, offset=offset) for name, shape, offset in tensors))


def test_sizes_are_counted_in_elements():
    assert [tensor.size for tensor in TWO_TENSORS.tensors] == [6, 2]
    assert TWO_TENSORS.size == 8


def test_a_tensor_without_dimensions_has_one_element():
    assert _manifest(("scale", (), 0), ("bias", (3,), 1)).size == 4


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", (2,), 1)],
        [("a", (2,), 0), ("b", (2,), 1)],
        [("a", (2,), 0), ("b", (2,), 3)],
        [("a", (2,), 0), ("b", (2,), 0)],
        [("b", (2,), 2), ("a", (2,), 0)],
    ],
)
def test_gaps_overlaps_and_another_order_are_refused(tensors):
    with pytest.raises(ValidationError, match="should start at"):
        _manifest(*tensors)


def test_two_tensors_may_not_share_a_name():
    with pytest.raises(ValidationError, match="share a name"):
        _manifest(("a", (2,), 0), ("a", (2,), 2))


def test_a_vector_has_at_least_one_tensor():
    with pytest.raises(ValidationError):
        Manifest(tensors=())


def test_a_vector_has_as_many_elements_as_32_bit_indices_can_name():
    assert _manifest(("a", (MAX_PARAMETERS,), 0)).size == MAX_PARAMETERS
    with pytest.raises(ValidationError, match="more than the 2147483647"):
        _manifest(("a", (2**16, 2**15), 0))
    with pytest.raises(ValidationError, match="more than"):
        _manifest(("a", (2**63, 2**63, 2**63), 0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": ["3"]},
        {"shape": [2.0]},
        {"shape": [1] * 17},
        {"shape": "3"},
        {"shape": {"3": 3}},
        {"shape": None},
        {"name": ""},
        {"name": "x" * 513},
        {"name": "two\nlines"},
        {"offset": -1},
        {"offset": False},
    ],
)
def test_a_tensor_that_cannot_be_is_a_decode_error(wrong):
    tensor = {"name": "a", "shape": [3], "offset": 0}
    assert wire.decode(Manifest, msgpack.packb({"tensors": [tensor]})).size == 3
    with pytest.raises(DecodeError, match=r"Manifest.tensors.0"):
        wire.decode(Manifest, msgpack.packb({"tensors": [tensor | wrong]}))


def test_only_float32_is_known():
    with pytest.raises(DecodeError, match=r"Manifest.dtype"):
        wire.decode(Manifest, msgpack.packb({"tensors": [{"name": "a", "shape": [3], "offset": 0}], "dtype": "float64"}))


def test_the_digest_is_of_one_line_for_each_tensor():
    lines = "conv.weight:2,3\nconv.bias:2"
    assert TWO_TENSORS.digest == hashlib.sha256(lines.encode()).hexdigest()


def test_the_digest_of_a_published_layout_never_changes():
    assert TWO_TENSORS.digest == "ea247417ed6809a908f8eb7a666e7b98423c2e79db9cd54a8cfd098cbbf484a9"
    assert (
        _manifest(("scale", (), 0), ("größe", (1, 1), 1)).digest
        == "c238b5633422c51cd196173dc4a137b4a75666ea8d84d803d46474d5c9bafe28"
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(one=manifests(), other=manifests())
def test_digests_are_equal_where_layouts_are(one, other):
    layouts = [[(tensor.name, tensor.shape) for tensor in manifest.tensors] for manifest in (one, other)]
    assert (one.digest == other.digest) == (layouts[0] == layouts[1])
    assert wire.decode(Manifest, wire.encode(one)).digest == one.digest


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(manifest=manifests(), data=st.data())
def test_every_element_belongs_to_exactly_one_tensor(manifest, data):
    position = data.draw(st.integers(0, manifest.size - 1))
    assert sum(tensor.offset <= position < tensor.offset + tensor.size for tensor in manifest.tensors) == 1


def test_what_was_computed_does_not_make_manifests_differ():
    copy = wire.decode(Manifest, wire.encode(TWO_TENSORS))
    assert TWO_TENSORS.digest
    assert copy == TWO_TENSORS
