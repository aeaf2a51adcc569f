"""The worked example of docs/protocol.md, made again by the code; and a decoder written from the document, against the code's."""

import hashlib
import re
import struct
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.indices import decode_indices
from broker_fl.parameters import digest
from schemas import wire
from schemas.manifest import Manifest, TensorSpec
from schemas.update import ModelUpdate
from workers.participation import is_selected

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLE = tomllib.loads(re.search(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL).group(1))
MANIFEST = Manifest(tensors=tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in EXAMPLE["tensors"]))
CODEC = parse_codec(EXAMPLE["codec"])
PAYLOAD = b"".join(
    bytes.fromhex(EXAMPLE[section][key])
    for section, key in [
        ("indices", "header"),
        ("indices", "planes"),
        ("indices", "high_stream"),
        ("values", "small"),
        ("values", "large"),
    ]
)


def _vector(elements: dict[str, float]) -> np.ndarray:
    vector = np.zeros(MANIFEST.size, np.float32)
    for element, value in elements.items():
        vector[int(element)] = value
    return vector


def _update() -> ModelUpdate:
    return ModelUpdate(
        federation=EXAMPLE["federation"],
        manifest_digest=MANIFEST.digest,
        codec=CODEC.name,
        payload=PAYLOAD,
        **EXAMPLE["update"],
    )


def test_the_manifest_is_hashed_by_its_lines():
    assert MANIFEST.digest == EXAMPLE["manifest"]["digest"]
    assert hashlib.sha256(EXAMPLE["manifest"]["lines"].encode()).hexdigest() == MANIFEST.digest


def test_the_delta_encodes_to_the_pieces():
    generator = np.random.default_rng(EXAMPLE["seed"])
    assert encode(_vector(EXAMPLE["delta"]), CODEC, manifest=MANIFEST, generator=generator).hex() == PAYLOAD.hex()


def test_the_pieces_decode_to_the_values():
    decoded = decode(PAYLOAD, CODEC, manifest=MANIFEST)
    assert decoded.dense().tolist() == _vector(EXAMPLE["decoded"]).tolist()
    assert digest(decoded.dense()) == EXAMPLE["frame"]["digest"]


def test_the_gaps_and_their_halves_are_those_of_the_indices():
    indices = decode_indices(PAYLOAD, size=MANIFEST.size).indices
    gaps = [int(gap) - 1 for gap in np.diff(indices, prepend=-1)]
    assert gaps == EXAMPLE["indices"]["gaps"]
    assert [gap % 128 for gap in gaps] == EXAMPLE["indices"]["low"]
    assert [gap // 128 for gap in gaps] == EXAMPLE["indices"]["high"]


def test_the_roundings_are_those_of_the_seed():
    drawn = np.random.default_rng(EXAMPLE["seed"]).random(2048, dtype=np.float32)
    assert drawn[:3].tolist() == EXAMPLE["values"]["u_small"]
    assert drawn[1024:1029].tolist() == EXAMPLE["values"]["u_large"]


def test_the_message_is_the_bytes():
    body = wire.encode(_update())
    assert body.hex() == EXAMPLE["message"]["hex"].replace("\n", "")
    assert len(body) == EXAMPLE["message"]["length"]
    assert hashlib.sha256(body).hexdigest() == EXAMPLE["message"]["sha256"]
    assert wire.decode(ModelUpdate, body) == _update()


def test_the_participant_is_drawn_by_the_hash():
    federation, party, version, number = EXAMPLE["participation"]["text"].split("/")
    drawn = hashlib.sha256(EXAMPLE["participation"]["text"].encode()).digest()[:8]
    assert drawn.hex() == EXAMPLE["participation"]["first_8_bytes"]
    threshold = EXAMPLE["participation"]["selected_from_fraction"]
    for fraction, expected in ((threshold - 1e-6, False), (threshold + 1e-6, True)):
        found = is_selected(federation=federation, party=party, version=int(version), number=int(number), fraction=fraction)
        assert found is expected


def _values_by_the_document(data: bytes, quantizer: str, n: int) -> tuple[list[float], int]:
    """And how many bytes they took."""
    if quantizer == "float32":
        return list(struct.unpack_from(f"<{n}f", data)), 4 * n
    if quantizer == "bfloat16":
        return [struct.unpack("<f", b"\x00\x00" + data[2 * i : 2 * i + 2])[0] for i in range(n)], 2 * n
    blocks = -(-n // 1024)
    scales = struct.unpack_from(f"<{blocks}f", data)
    if quantizer == "int8":
        codes, used = struct.unpack_from(f"<{n}b", data, 4 * blocks), n
    else:
        packed, used = data[4 * blocks :], (n + 1) // 2
        codes = [(packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15) - 8 for i in range(n)]
    return [float(np.float32(code) * np.float32(scales[i // 1024])) for i, code in enumerate(codes)], 4 * blocks + used


def _indices_by_the_document(data: bytes) -> tuple[list[int], int]:
    k, r, h = struct.unpack_from("<IBI", data)
    bits = [byte >> 7 - bit & 1 for byte in data[9:] for bit in range(8)]
    plane = 8 * -(-k // 8)
    low = [sum(bits[b * plane + j] << b for b in range(r)) for j in range(k)]
    indices, at, previous = [], r * plane, -1
    for j in range(k):
        high = bits.index(1, at) - at
        at += high + 1
        previous += (high << r) + low[j] + 1
        indices.append(previous)
    return indices, 9 + r * plane // 8 + h


def _decoded_by_the_document(payload: bytes, name: str, manifest: Manifest) -> list[float]:
    sparsifier, _, quantizer = name.rpartition("+")
    if not sparsifier:
        values, used = _values_by_the_document(payload, quantizer, manifest.size)
        assert used == len(payload)
        return values
    indices, start = _indices_by_the_document(payload)
    small = [e for t in manifest.tensors if t.size <= 1024 for e in range(t.offset, t.offset + t.size)]
    of_small, used = _values_by_the_document(payload[start:], "int8" if quantizer == "int4" else quantizer, len(small))
    of_large, rest = _values_by_the_document(payload[start + used :], quantizer, len(indices))
    assert start + used + rest == len(payload)
    vector = [0.0] * manifest.size
    for element, value in zip([*small, *indices], [*of_small, *of_large], strict=True):
        vector[element] = value
    return vector


def test_the_document_alone_is_enough_to_decode_the_example():
    assert _decoded_by_the_document(PAYLOAD, EXAMPLE["codec"], MANIFEST) == _vector(EXAMPLE["decoded"]).tolist()


@pytest.mark.parametrize("quantizer", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("sparsifier", ["", "topk:0.01+", "topk:0.7+"])
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=3))
def test_the_document_alone_is_enough_to_decode_what_the_code_encodes(sparsifier, quantizer, seed, sizes):
    offsets = np.cumsum([0, *sizes]).tolist()
    tensors = [TensorSpec(name=str(i), shape=(size,), offset=offsets[i]) for i, size in enumerate(sizes)]
    manifest = Manifest(tensors=tuple(tensors))
    generator = np.random.default_rng(seed)
    vector = generator.normal(size=manifest.size).astype(np.float32)
    name = sparsifier + quantizer
    payload = encode(vector, parse_codec(name), manifest=manifest, generator=generator)
    assert (
        _decoded_by_the_document(payload, name, manifest)
        == decode(payload, parse_codec(name), manifest=manifest).dense().tolist()
    )
