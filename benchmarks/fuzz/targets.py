"""What is fuzzed: everything that decodes the bytes of strangers, and what each may cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import msgpack
import numpy as np

from aggregator.admission import Limits, Refused, Sender, examine
from benchmarks.fuzz import samples
from benchmarks.fuzz.mutations import mutated, mutated_fields, mutated_named
from benchmarks.fuzz.samples import MANIFESTS, MIXED
from broker_fl.codecs.chain import change, whole_model
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.errors import ConfigurationError, DecodeError
from broker_fl.topology import Names
from broker_fl.transports.parts import Assembler
from broker_fl.transports.transport import Delivery
from schemas import wire
from schemas.frame import ModelFrame

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    """GROUP or GROUP/WHICH."""
    run: Callable[[bytes], object]
    """Takes the bytes of a case. It may raise DecodeError, and nothing else."""
    seeds: Callable[[], list[bytes]]
    """Valid cases."""
    bound: Callable[[bytes], int]
    """The bytes of memory that a case may cost."""
    mutate: Callable[[bytes, Sequence[bytes], Random], bytes] = mutated
    bombs: Sequence[bytes] = ()
    """Cases that are tried once, and not mutated."""

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def targets() -> list[Target]:
    codecs = [
        Target(
            f"codec/{codec}/{layout}",
            partial(_decode_payload, codec, layout),
            seeds=partial(samples.payloads, codec, layout),
            bound=partial(_payload_bound, MANIFESTS[layout].size),
        )
        for codec in samples.CODECS
        for layout in MANIFESTS
    ]
    messages = [
        Target(
            f"wire/{type(message).__name__}",
            partial(wire.decode, type(message)),
            seeds=partial(list, [wire.encode(message)]),
            bound=_wire_bound,
            mutate=mutated_fields,
            bombs=samples.BOMBS,
        )
        for message in samples.MESSAGES
    ]
    return [
        *codecs,
        *messages,
        Target("name", _decode_named, samples.named_payloads, partial(_payload_bound, MIXED.size), mutated_named),
        Target("frame", _decode_frame, samples.frames, _wire_and_payload_bound, mutated_fields),
        Target("parts", _assemble, samples.deliveries, _wire_bound, mutated_fields),
        Target("examine", _examine, samples.updates, _wire_and_payload_bound, mutated_fields),
    ]


def _wire_bound(body: bytes) -> int:
    """An entry has a byte at least, and becomes an object."""
    return 512 * len(body) + MIB


def _payload_bound(size: int, body: bytes) -> int:
    """A few vectors of `size` elements, indices of 8 bytes and their temporaries; and what is unpacked from the payload."""
    return 64 * size + 16 * len(body) + MIB


def _wire_and_payload_bound(body: bytes) -> int:
    """Of a message that holds a payload for MIXED; its model is copied, changed and rounded."""
    return _wire_bound(body) + _payload_bound(4 * MIXED.size, body)


def _decode_payload(codec: str, layout: str, body: bytes) -> None:
    size = MANIFESTS[layout].size
    delta = decode(body, parse_codec(codec), manifest=MANIFESTS[layout])
    assert (delta.size, delta.values.dtype) == (size, np.float32)
    if delta.indices is None:
        assert delta.values.shape == (size,)
    else:
        assert delta.values.shape == delta.indices.shape
        counts = np.bincount(delta.indices, minlength=size)
        assert counts.size == size
        assert counts.max(initial=0) <= 1
    if delta.is_finite() and delta.largest() <= 1e6:
        delta.norm()
        delta.add_to(np.zeros(size, np.float32), 0.5)


def _decode_named(body: bytes) -> None:
    name, _, payload = body.partition(b"\x00")
    try:
        codec = parse_codec(name.decode("utf-8", "surrogateescape"))
    except ConfigurationError as exc:
        raise DecodeError(str(exc)) from exc
    assert parse_codec(codec.name) == codec
    decode(payload, codec, manifest=MIXED)


def _decode_frame(body: bytes) -> None:
    frame = wire.decode(ModelFrame, body)
    before = samples.vectors("mixed")[0]
    model = before.copy()
    try:
        change(model, frame, manifest=MIXED)
    except DecodeError:
        assert model.tobytes() == before.tobytes(), "a frame that was refused has changed the model"
    whole = whole_model(frame, manifest=MIXED)
    assert (whole.shape, whole.dtype) == ((MIXED.size,), np.float32)


def _assemble(body: bytes) -> None:
    """What is no list, or in it no delivery, is not a case of this target, and passes."""
    try:
        deliveries = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return
    assembler, refusal = Assembler(), None
    for delivery in deliveries if isinstance(deliveries, list) else ():
        match delivery:
            case [str() as message_id, dict() as headers, bytes() as chunk]:
                part = Delivery(chunk, headers, message_id, samples.PARTY, "", "", redelivered=False, tag=1, offset=None)
                try:
                    assembler.add(part)
                except DecodeError as exc:
                    refusal = refusal or exc
    if refusal is not None:
        raise refusal


def _examine(body: bytes) -> None:
    limits = Limits(Names(samples.FEDERATION), MIXED, MIB, 1e4)
    verdict = examine(body, Sender(samples.PARTY, samples.UPDATE_ID), limits)
    if isinstance(verdict, Refused):
        raise DecodeError(f"{verdict.reason}: {verdict.detail}")
