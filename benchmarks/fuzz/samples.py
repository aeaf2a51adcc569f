"""What the fuzzing begins with: models, codecs, and valid encodings of everything that a stranger may send."""

from functools import cache

import msgpack
import numpy as np

from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from broker_fl.parameters import Vector, manifest_of
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.event import Event, UpdateFacts
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan
from schemas.manifest import Manifest
from schemas.receipt import Receipt
from schemas.update import ModelUpdate

PARTY, FEDERATION, UPDATE_ID = "charite-2", "hospitals", "0" * 32

QUANTIZED = [name for name, entry in QUANTIZERS.items() if entry.arguments is None] + [
    f"{name}:{of}" for name, entry in QUANTIZERS.items() if entry.arguments for of in (entry.arguments[0], entry.arguments[-1])
]
SPARSIFIED = [*(entry.example for entry in SPARSIFIERS.values()), "topk:1", "threshold:2.5"]
CODECS = [*QUANTIZED, *(f"{sparsifier}+{quantizer}" for sparsifier in SPARSIFIED for quantizer in QUANTIZED)]


def _layout(**sizes: int) -> Manifest:
    return manifest_of({name: np.zeros(size, np.float32) for name, size in sizes.items()})


MANIFESTS = {
    "mixed": _layout(bias=10, weight=3000, norm=1024, next_weight=1025, last_bias=1),
    "small": _layout(bias=5, norm=1000),
    "one": _layout(scale=1),
    "large": _layout(weight=98_000, bias=100, out=1900),
}
MIXED = MANIFESTS["mixed"]


@cache
def vectors(layout: str) -> list[Vector]:
    """With heavy tails; the same with 1% of the elements other than zero; all elements equal."""
    manifest = MANIFESTS[layout]
    generator = np.random.default_rng(0)
    tailed = generator.standard_t(3, manifest.size).astype(np.float32)
    some = np.where(generator.random(manifest.size) < 0.01, tailed, 0).astype(np.float32)
    return [tailed, some, np.full(manifest.size, -0.5, np.float32)]


def payloads(codec: str, layout: str) -> list[bytes]:
    generator = np.random.default_rng(0)
    return [encode(vector, parse_codec(codec), manifest=MANIFESTS[layout], generator=generator) for vector in vectors(layout)]


@cache
def _payload_by_codec() -> dict[str, bytes]:
    return {codec: payloads(codec, "mixed")[0] for codec in CODECS}


def named_payloads() -> list[bytes]:
    """A codec's name, a zero byte, a payload."""
    return [f"{codec}\0".encode() + payload for codec, payload in _payload_by_codec().items()]


def updates() -> list[bytes]:
    return [wire.encode(_update(codec, payload)) for codec, payload in _payload_by_codec().items()]


def frames() -> list[bytes]:
    payload_by_codec = _payload_by_codec()
    sparse, dense = payload_by_codec["topk:0.01+int4"], payload_by_codec["int8"]
    changes = [_frame(codec, payload) for codec, payload in payload_by_codec.items()]
    rounded = [_frame("topk:0.01+int4", sparse, rounding=codec) for codec in CODECS]
    return [wire.encode(each) for each in (*changes, *rounded, _frame("int8", dense, base=None), _frame("int8", b""))]


def deliveries() -> list[bytes]:
    """Messages in parts, as msgpack: a list of [message id, headers, body]. Alone, two together, and one begun anew."""
    generator = np.random.default_rng(0)
    rows = [
        [[part.message_id, dict(part.headers), part.body] for part in split(whole, part_bytes=64, limit_bytes=90)]
        for whole in (Message("x", generator.bytes(size), message_id=str(size)) for size in (100, 1000, 5000))
    ]
    return [msgpack.packb(row) for row in (*rows, rows[0] + rows[1], rows[1][:3] + rows[1])]


def _update(codec: str, payload: bytes) -> ModelUpdate:
    return ModelUpdate(
        federation=FEDERATION,
        party=PARTY,
        update_id=UPDATE_ID,
        sequence=7,
        base_version=41,
        base_digest="ab" * 32,
        manifest_digest=MIXED.digest,
        codec=codec,
        num_samples=4708,
        num_steps=735,
        train_loss=0.25,
        payload=payload,
    )


def _frame(codec: str, payload: bytes, *, base: int | None = 8, rounding: str | None = None) -> ModelFrame:
    return ModelFrame(
        federation=FEDERATION,
        ledger="0" * 32,
        number=9,
        base=base,
        version=41,
        digest="cd" * 32,
        codec=codec,
        rounding=rounding,
        keyframe=KeyframePlace(number=4, bytes=1000, log_bytes=10),
        log_bytes=20,
        over=False,
        manifest=None if base else MIXED,
        plan=None if base else PLAN,
        payload=payload,
    )


PLAN = Plan(training=TrainingPlan(steps=50), update_codec="topk:0.01+int4", fraction=0.5, repeat=False)
MESSAGES: tuple[wire.Message, ...] = (
    _update("int8", b"\x00\x01\xff"),
    _frame("float32", b"", base=None),
    Receipt(federation=FEDERATION, party=PARTY, update_id=UPDATE_ID, outcome="merged", version=80, staleness=39, weight=0.5),
    Event(
        kind="updates.decided",
        federation=FEDERATION,
        at=1_700_000_000.5,
        version=42,
        facts={"number": 3, "seconds": 0.5, "codec": "int8", "over": False},
        updates=(UpdateFacts(party=PARTY, outcome="merged", staleness=1, weight=0.2, bytes=9, codec="int8", reason=None),) * 3,
    ),
    MIXED,
    PLAN,
    TrainingPlan(),
    KeyframePlace(number=1, bytes=2, log_bytes=3),
)

_OPENINGS = (b"\x81\xa7tensors\xdc\x0f\xa0", b"\x81\xa7updates\xdc\x0f\xa0", b"\xdc\x0f\xa0")
BOMBS = tuple(opening + entry * 4000 for opening in _OPENINGS for entry in (b"\x80", b"\x90", b"\xc0"))
"""Lists of 4,000 of the smallest that msgpack has, alone and where a message has a list: what is refused must not cost much."""
