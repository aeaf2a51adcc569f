"""Making frames, and when the next one is due. Pure.

What the receivers hold is a state of its own beside the model: b <- b + decode(encode(model - b)). What a codec leaves out stays
in the difference, so that no residual has to be kept. The state is a function of the version: a frame that repeats one changes
nothing.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from aggregator.records import FrameRow
from broker_fl.codecs.budget import warmed_up
from broker_fl.codecs.chain import rounded
from broker_fl.codecs.codec import Codec, decode, encode, parse_codec
from broker_fl.parameters import Vector, digest, fingerprint
from schemas import wire
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan
from schemas.manifest import Manifest
from schemas.privacy import PrivacyPlan

EXACT = "float32"
"""The codec that a keyframe takes where another one would change what it holds."""

_LEAST_REDRAW_S = 5.0


@dataclass(frozen=True, slots=True)
class BroadcastPlan:
    """What the frames of this federation say beside the model, how they are encoded, and how often there is one."""

    federation: str
    ledger_id: str
    manifest: Manifest
    down: str
    """The codec of delta frames, after the warm-up."""
    keyframe: str
    """The codec of keyframes, dense."""
    keyframe_every_frames: int
    up: str
    """The codec of updates, after the warm-up."""
    warm_up_versions: int
    warm_up_density: float
    momentum_correction: float
    training: TrainingPlan
    fraction: float
    repeat: bool
    every_versions: int
    every_s: float
    privacy: PrivacyPlan | None = None

    def at(self, version: int) -> Plan:
        """What training from this version should use. Raises ConfigurationError if `up` has no density that could warm up."""
        return Plan(
            training=self.training,
            update_codec=self._warmed_up(self.up, version).name,
            momentum_correction=self.momentum_correction,
            fraction=self.fraction,
            repeat=self.repeat,
            privacy=self.privacy,
        )

    def down_at(self, version: int) -> Codec:
        """Of the delta frame that makes this version. A dense codec has nothing to warm up."""
        codec = parse_codec(self.down)
        return codec if codec.density is None else self._warmed_up(self.down, version)

    def _warmed_up(self, name: str, version: int) -> Codec:
        codec = parse_codec(name)
        if not self.warm_up_versions:
            return codec
        return warmed_up(codec, version, over_versions=self.warm_up_versions, from_density=self.warm_up_density)


@dataclass(frozen=True, slots=True)
class Held:
    """What the receivers hold after a frame."""

    frame: FrameRow
    """Without its bodies."""
    model: Vector
    """Never changed in place: model mixing keeps it as a base."""
    keyframe: KeyframePlace


def make_frame(
    plan: BroadcastPlan, held: Held | None, model: Vector, *, version: int, over: bool, at: float, is_anew: bool = False
) -> tuple[FrameRow, Held]:
    """The next frame, and what the receivers hold after it. `model` is finite, and only read.

    `is_anew`: the model is no change of what the receivers hold, as after a rollback; they get it whole.
    """
    if held is None or is_anew:
        return _anew(plan, held, model, version=version, over=over, at=at)
    if version == held.frame.version:
        return _repeated(plan, held, over=over, at=at)
    return _changed(plan, held, model, version=version, over=over, at=at)


def _anew(plan: BroadcastPlan, held: Held | None, model: Vector, *, version: int, over: bool, at: float) -> tuple[FrameRow, Held]:
    """A keyframe, and its announcement. Past it lead no changes: who is before it reckons that they would cost more."""
    whole, received = rounded(model, plan.keyframe, manifest=plan.manifest)
    rules = plan.at(version)
    number, log_bytes = (1, 0) if held is None else (held.frame.number + 1, held.frame.log_bytes + unpassable(plan.manifest))
    place = KeyframePlace(number=number, bytes=len(whole), log_bytes=log_bytes)
    announcement = ModelFrame(
        federation=plan.federation,
        ledger=plan.ledger_id,
        number=number,
        base=None,
        version=version,
        digest=digest(received),
        codec=plan.keyframe,
        rounding=_rounding(plan.keyframe),
        keyframe=place,
        log_bytes=log_bytes,
        over=over,
        manifest=plan.manifest,
        plan=rules,
        payload=b"",
    )
    row = _row(announcement, at=at, model_digest=fingerprint(model), plan=plan_digest(rules), log_bytes=log_bytes)
    row = _with_keyframe(row, announcement, plan, rules, payload=whole, codec=plan.keyframe)
    return row, Held(_without_bodies(row), received, place)


def unpassable(manifest: Manifest) -> int:
    """Bytes that a frame without a base adds to the log's count, except the first: more than any keyframe has."""
    return 8 * manifest.size + (64 << 10)


def _repeated(plan: BroadcastPlan, held: Held, *, over: bool, at: float) -> tuple[FrameRow, Held]:
    frame, rules = _next(plan, held, version=held.frame.version, over=over)
    if not _changes_cost_more(held):
        row = _delta_row(frame, held, at=at, model_digest=held.frame.model_digest, plan=rules)
        return row, replace(held, frame=_without_bodies(row))
    # Where nobody trains for days, repeats alone would push what came after the last keyframe out of the log.
    codec, whole = _exactly(plan, held.model)
    place = KeyframePlace(number=frame.number, bytes=len(whole), log_bytes=frame.log_bytes)
    frame = frame.model_copy(update={"keyframe": place})
    row = _delta_row(frame, held, at=at, model_digest=held.frame.model_digest, plan=rules)
    row = _with_keyframe(row, frame, plan, rules, payload=whole, codec=codec)
    return row, replace(held, frame=_without_bodies(row), keyframe=place)


def _changed(plan: BroadcastPlan, held: Held, model: Vector, *, version: int, over: bool, at: float) -> tuple[FrameRow, Held]:
    frame, rules = _next(plan, held, version=version, over=over)
    # Hashing takes as long as encoding, and lets go of the interpreter's lock.
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
        model_digest = beside.submit(fingerprint, model)
        codec = plan.down_at(version)
        generator = np.random.default_rng(frame.number)
        payload = encode(model - held.model, codec, manifest=plan.manifest, generator=generator)
        received = held.model.copy()
        decode(payload, codec, manifest=plan.manifest).add_to(received)
        facts: dict[str, object] = {"codec": codec.name, "payload": payload, "log_bytes": frame.log_bytes + len(payload)}
        whole: bytes | None = None
        if keyframe_is_due(plan, held):
            whole, received = rounded(received, plan.keyframe, manifest=plan.manifest)
            facts["rounding"] = _rounding(plan.keyframe)
            facts["keyframe"] = KeyframePlace(number=frame.number, bytes=len(whole), log_bytes=frame.log_bytes + len(payload))
        frame = frame.model_copy(update={**facts, "digest": digest(received)})
        row = _delta_row(frame, held, at=at, model_digest=model_digest.result(), plan=rules)
    if whole is not None:
        row = _with_keyframe(row, frame, plan, rules, payload=whole, codec=plan.keyframe)
    return row, Held(_without_bodies(row), received, frame.keyframe)


def keyframe_is_due(plan: BroadcastPlan, held: Held) -> bool:
    """Whether the next change should come with a whole model: after so many frames, or where the changes cost more than one."""
    frames = held.frame.number + 1 - held.keyframe.number
    return frames >= plan.keyframe_every_frames or _changes_cost_more(held)


def _changes_cost_more(held: Held) -> bool:
    return held.frame.log_bytes - held.keyframe.log_bytes > held.keyframe.bytes


def exact_keyframe(plan: BroadcastPlan, held: Held, *, body: bytes) -> tuple[FrameRow, Held]:
    """The held frame, whose body in the model log this is, with a keyframe of what the receivers hold, to the last bit.

    The keyframe says the plan in force now. Where the frame had another one, some know the one and some the other: the row then
    has none, so that the next frame says it to all.
    """
    codec, whole = _exactly(plan, held.model)
    frame = wire.decode(ModelFrame, body)
    place = KeyframePlace(number=frame.number, bytes=len(whole), log_bytes=frame.log_bytes)
    frame = frame.model_copy(update={"keyframe": place})
    rules = plan.at(frame.version)
    said = held.frame.plan if plan_digest(rules) == held.frame.plan else ""
    row = _with_keyframe(replace(held.frame, plan=said, body=body), frame, plan, rules, payload=whole, codec=codec)
    return row, replace(held, frame=_without_bodies(row), keyframe=place)


def _exactly(plan: BroadcastPlan, model: Vector) -> tuple[str, bytes]:
    """Codec and payload that hold the model to the last bit: the plan's codec where that loses nothing, else float32."""
    payload, held = rounded(model, plan.keyframe, manifest=plan.manifest)
    if np.array_equal(held.view(np.uint32), model.view(np.uint32)):
        return plan.keyframe, payload
    return EXACT, rounded(model, EXACT, manifest=plan.manifest)[0]


def announcement(keyframe: bytes) -> bytes:
    """For the model log: the same frame as the keyframe's, without the model."""
    return wire.encode(wire.decode(ModelFrame, keyframe).model_copy(update={"payload": b""}))


def plan_digest(plan: Plan) -> str:
    return hashlib.sha256(wire.encode(plan)).hexdigest()


def is_due(plan: BroadcastPlan, last: FrameRow | None, *, version: int, now: float) -> bool:
    """Whether enough was merged, or enough time went by since the last frame, or the settings changed; never while that one waits
    to be published."""
    if last is None:
        return True
    if last.published_at is None:
        return False
    if version == last.version:
        if plan_digest(plan.at(version)) != last.plan:
            return True
        # Where only a share of the parties trains from each frame, a frame that drew none must not be the last.
        return plan.fraction < 1 and has_passed(max(plan.every_s, _LEAST_REDRAW_S), since=last.at, now=now)
    return version - last.version >= plan.every_versions or has_passed(plan.every_s, since=last.at, now=now)


def has_passed(seconds: float, *, since: float, now: float) -> bool:
    """Also where the clock was set back: nobody knows how much time went by, and nothing may wait for the old time to come
    again.
    """
    return not 0 <= now - since < seconds


def _next(plan: BroadcastPlan, held: Held, *, version: int, over: bool) -> tuple[ModelFrame, Plan]:
    """A frame that changes nothing, and the plan in force."""
    last, rules = held.frame, plan.at(version)
    frame = ModelFrame(
        federation=plan.federation,
        ledger=plan.ledger_id,
        number=last.number + 1,
        base=last.number,
        version=version,
        digest=last.digest,
        codec=plan.down,
        keyframe=held.keyframe,
        log_bytes=last.log_bytes,
        over=over,
        plan=None if plan_digest(rules) == last.plan else rules,
        payload=b"",
    )
    return frame, rules


def _with_keyframe(row: FrameRow, frame: ModelFrame, plan: BroadcastPlan, rules: Plan, *, payload: bytes, codec: str) -> FrameRow:
    """The frame's row, and the same frame standing alone, with the whole model that it leaves behind."""
    facts = {"base": None, "manifest": plan.manifest, "plan": rules, "codec": codec, "payload": payload}
    keyframe = wire.encode(frame.model_copy(update=facts))
    return replace(row, keyframe_codec=codec, keyframe_size=len(keyframe), keyframe=keyframe)


def _delta_row(frame: ModelFrame, held: Held, *, at: float, model_digest: str, plan: Plan) -> FrameRow:
    row = _row(frame, at=at, model_digest=model_digest, plan=plan_digest(plan), log_bytes=held.frame.log_bytes)
    return replace(row, log_bytes=row.log_bytes + row.size)


def _row(frame: ModelFrame, *, at: float, model_digest: str, plan: str, log_bytes: int) -> FrameRow:
    body = wire.encode(frame)
    return FrameRow(
        number=frame.number,
        at=at,
        version=frame.version,
        base=frame.base,
        digest=frame.digest,
        model_digest=model_digest,
        codec=frame.codec,
        rounding=frame.rounding,
        plan=plan,
        over=frame.over,
        size=len(body),
        log_bytes=log_bytes,
        body=body,
    )


def _without_bodies(row: FrameRow) -> FrameRow:
    return replace(row, body=None, keyframe=None)


def _rounding(codec: str) -> str | None:
    """What everyone has to do to hold what a keyframe in this codec holds."""
    return None if codec == EXACT else codec
