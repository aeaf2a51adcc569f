"""The worked example of docs/protocol.md, made again by the code, and by what was written from the document alone."""

import hashlib
import re
import struct
import tomllib

import blake3
import by_the_document
import ed25519_by_the_rfc as rfc8032
import numpy as np
import pytest
from by_the_document import DOCUMENT, as_bits

from broker_fl.codecs.chain import rounded
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.entropy import encode_symbols
from broker_fl.codecs.indices import decode_indices
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.rotation import eden
from broker_fl.codecs.sparsify import stratified
from broker_fl.codecs.splitmix import splitmix64
from broker_fl.parameters import digest
from broker_fl.privacy.accounting import Steps, composed, epsilon_of
from broker_fl.signing import SigningKey, is_signed, update_statement
from schemas import wire
from schemas.manifest import Manifest, TensorSpec
from schemas.update import ModelUpdate
from workers.participation import is_selected

EXAMPLE = tomllib.loads(re.search(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL).group(1))
MANIFEST = Manifest(tensors=tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in EXAMPLE["tensors"]))
CODEC = parse_codec(EXAMPLE["codec"])
PAYLOAD = b"".join(
    bytes.fromhex(EXAMPLE[section][key])
    for section, key in [
        ("choice", "header"),
        ("choice", "planes"),
        ("choice", "high_stream"),
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


def test_the_gaps_and_their_halves_are_those_of_the_ranks():
    ranks = decode_indices(Reader(PAYLOAD), size=1320)
    gaps = [int(gap) - 1 for gap in np.diff(ranks, prepend=-1)]
    assert gaps == EXAMPLE["choice"]["gaps"]
    assert [gap % 128 for gap in gaps] == EXAMPLE["choice"]["low"]
    assert [gap // 128 for gap in gaps] == EXAMPLE["choice"]["high"]


def test_the_roundings_are_those_of_the_seed():
    drawn = np.random.default_rng(EXAMPLE["seed"])
    for key, count in (("u_small", 3), ("u_large", 5)):
        assert drawn.random(count, dtype=np.float32).tolist() == EXAMPLE["values"][key]


def test_the_message_is_the_bytes():
    body = wire.encode(_update())
    assert body.hex() == EXAMPLE["message"]["hex"].replace("\n", "")
    assert len(body) == EXAMPLE["message"]["length"]
    assert hashlib.sha256(body).hexdigest() == EXAMPLE["message"]["sha256"]
    assert wire.decode(ModelUpdate, body) == _update()


def test_the_update_is_signed_by_the_key():
    example = {name: text.replace("\n", "") for name, text in EXAMPLE["signature"].items()}
    assert blake3.blake3(PAYLOAD).hexdigest() == example["payload_digest"]
    assert update_statement(_update(), payload_digest=example["payload_digest"]).decode("ascii") == example["statement"]
    key = SigningKey.from_text(example["private_key"])
    assert key.public == example["public_key"]
    assert is_signed("update", example["statement"].encode("ascii"), example["signature"], by=key.public)
    by_hand = rfc8032.sign(bytes.fromhex(example["private_key"]), by_the_document.signed("update", example["statement"]))
    assert key.sign("update", example["statement"].encode("ascii")) == by_hand.hex() == example["signature"]


def test_the_document_alone_is_enough_to_state_the_update():
    fields = {**EXAMPLE["update"], "federation": EXAMPLE["federation"], "codec": EXAMPLE["codec"]}
    stated = by_the_document.update_statement(fields, manifest_digest=EXAMPLE["manifest"]["digest"], payload=PAYLOAD)
    assert stated == EXAMPLE["signature"]["statement"].replace("\n", "")


def test_the_participant_is_drawn_by_the_hash():
    federation, party, version, number = EXAMPLE["participation"]["text"].split("/")
    drawn = hashlib.sha256(EXAMPLE["participation"]["text"].encode()).digest()[:8]
    assert drawn.hex() == EXAMPLE["participation"]["first_8_bytes"]
    threshold = EXAMPLE["participation"]["selected_from_fraction"]
    for fraction, expected in ((threshold - 1e-6, False), (threshold + 1e-6, True)):
        found = is_selected(federation=federation, party=party, version=int(version), number=int(number), fraction=fraction)
        assert found is expected


def test_the_document_alone_is_enough_to_decode_the_example():
    found = by_the_document.decoded(PAYLOAD, EXAMPLE["codec"], [tensor.size for tensor in MANIFEST.tensors])
    expected = {int(element): value for element, value in EXAMPLE["decoded"].items()}
    assert as_bits(found.values()) == as_bits(expected[element] for element in found)
    assert set(found) == set(expected)


def test_the_outputs_of_splitmix64_and_what_they_draw_are_those_of_the_seed():
    seed, outputs = EXAMPLE["splitmix64"]["seed"], EXAMPLE["splitmix64"]["outputs"]
    assert [f"{int(output):016x}" for output in splitmix64(seed, start=0, count=len(outputs))] == outputs
    assert [f"{by_the_document.splitmix64(seed, i):016x}" for i in range(len(outputs))] == outputs
    drawn = EXAMPLE["splitmix64"]["drawn"]
    assert stratified(1320, 5, seed=seed).tolist() == by_the_document.drawn(seed, 5, 1320) == drawn


def test_the_symbols_are_coded_to_the_bytes():
    symbols = np.ones(200, np.uint8)
    symbols[[20, 77, 150]] = 0
    payload, ans = encode_symbols(symbols, alphabet=2), EXAMPLE["ans"]
    assert payload.hex() == bytes.fromhex(ans["symbols"]).hex()
    assert (ans["first"], ans["last"]) == (payload[1], payload[2])
    assert ans["weights"] == [by_the_document.weight(byte) for byte in payload[3:5]]
    assert ans["frequencies"] == by_the_document.frequencies(payload[3:5])
    assert by_the_document.ans_encoded(symbols.tolist(), 0, payload[3:5]) == payload


def test_the_rotated_values_are_the_bytes_and_decode():
    example = EXAMPLE["eden"]
    payload = eden(2).encode(np.array(example["values"], np.float32), np.random.default_rng(EXAMPLE["seed"]))
    assert payload.hex() == bytes.fromhex(example["bytes"]).hex()
    assert eden(2).decode(Reader(payload), 3).tolist() == example["decoded"]
    assert by_the_document.values(by_the_document.Bytes(payload), "eden:2", 3) == example["decoded"]


def test_the_trainings_cost_what_the_accountant_says():
    example = EXAMPLE["privacy"]
    history = composed(Steps(noise, rate, steps) for noise, rate, steps in example["trainings"])
    assert epsilon_of(history, delta=example["delta"], accountant="rdp") == pytest.approx(example["rdp"], abs=5e-7)


@pytest.mark.parametrize(("codec", "code"), [("float16", "<4H"), ("bfloat16", "<4H"), ("int8", "<5x4B")])
def test_the_vector_is_rounded_to_the_bits(codec, code):
    vector = np.array(EXAMPLE["rounding"]["vector"], np.float32)
    assert vector.tolist() == EXAMPLE["rounding"]["vector"]
    manifest = Manifest(tensors=(TensorSpec(name="a", shape=(4,), offset=0),))
    payload, held = rounded(vector, codec, manifest=manifest)
    found = list(struct.unpack(code, payload))
    assert (found if codec == "int8" else [f"{bits:04x}" for bits in found]) == EXAMPLE["rounding"][codec]
    assert as_bits(by_the_document.rounded(vector.tolist(), codec)) == as_bits(held.tolist())
