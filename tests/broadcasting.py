"""The aggregator's side of the two logs of the model, by hand: frames that follow one another, and their messages."""

import dataclasses

import numpy as np

from broker_fl.codecs.chain import change, rounded
from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.parameters import digest
from broker_fl.signing import SIGNATURE, body_statement
from broker_fl.topology import Names
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan

PLAN = Plan(training=TrainingPlan(), update_codec="float32", fraction=1.0, repeat=False)


@dataclasses.dataclass
class Broadcaster:
    """Each method makes the next frames: pairs of what goes to the keyframe log and what goes to the model log."""

    federation: str
    manifest: object
    ledger: str = "a" * 32
    down: str = "float32"
    keyframe: str = "float32"
    plan: Plan = PLAN
    number: int = 0
    version: int = 0
    log_bytes: int = 0
    model: np.ndarray | None = None
    place: KeyframePlace | None = None

    def first(self, model, *, version=0, over=False):
        """A keyframe, and its announcement: frame 1, or another where `number` was set."""
        self.number, self.version = self.number + 1, version
        return self._anew(np.asarray(model, np.float32), over=over)

    def announce(self, *, over=False):
        """What a restarted aggregator sends: the frame that all hold already, as a keyframe and an announcement.

        In float32 where the codec of keyframes would change what they hold.
        """
        wanted = self.keyframe
        if rounded(self.model, wanted, manifest=self.manifest)[1].tobytes() != self.model.tobytes():
            self.keyframe = "float32"
        pair = self._anew(self.model, over=over)
        self.keyframe = wanted
        return pair

    def _anew(self, model, *, over):
        payload, self.model = rounded(model, self.keyframe, manifest=self.manifest)
        self.place = KeyframePlace(number=self.number, bytes=len(payload), log_bytes=self.log_bytes)
        announcement = self._frame(
            base=None, over=over, codec=self.keyframe, rounding=self._rounding(), manifest=self.manifest, plan=self.plan
        )
        return announcement.model_copy(update={"payload": payload}), announcement

    def next(self, model=None, *, version=None, over=False, with_keyframe=False, plan=None):
        """A delta frame towards the model, with a keyframe where asked for, and what the receivers hold then."""
        base, self.number = self.number, self.number + 1
        self.version = self.version + 1 if version is None else version
        self.plan = plan or self.plan
        payload = b"" if model is None else self._change(np.asarray(model, np.float32))
        draft = self._frame(base=base, over=over, codec=self.down, payload=payload, plan=plan)
        self.log_bytes += len(wire.encode(draft))
        draft = draft.model_copy(update={"rounding": self._rounding() if with_keyframe else None, "log_bytes": self.log_bytes})
        self.model = self.model.copy()
        change(self.model, draft, manifest=self.manifest)
        keyframe = None
        if with_keyframe:
            whole, _ = rounded(self.model, self.keyframe, manifest=self.manifest)
            self.place = KeyframePlace(number=self.number, bytes=len(whole), log_bytes=self.log_bytes)
            keyframe = self._frame(
                base=None, over=over, codec=self.keyframe, payload=whole, manifest=self.manifest, plan=self.plan
            )
        return keyframe, draft.model_copy(update={"keyframe": self.place, "digest": digest(self.model)})

    def _change(self, model):
        codec, generator = parse_codec(self.down), np.random.default_rng(self.number)
        return encode(model - self.model, codec, manifest=self.manifest, generator=generator)

    def _rounding(self):
        return None if self.keyframe == "float32" else self.keyframe

    def _frame(self, **facts):
        return ModelFrame(
            **{
                "federation": self.federation,
                "ledger": self.ledger,
                "number": self.number,
                "version": self.version,
                "digest": digest(self.model),
                "keyframe": self.place or KeyframePlace(number=1, bytes=0, log_bytes=0),
                "log_bytes": self.log_bytes,
                "payload": b"",
            }
            | facts
        )


def messages(exchange, frame, *, part_bytes=None, key=None):
    """Of one frame, as the aggregator publishes it: in parts where their size is given, signed where there is a key."""
    kind = "delta" if frame.base is not None else "keyframe" if frame.payload else "announcement"
    headers = {"x-fl-number": frame.number, "x-fl-kind": kind, "x-fl-version": frame.version, "x-fl-base": frame.base or 0}
    headers["x-fl-codec"] = frame.codec
    body = wire.encode(frame)
    if key is not None:
        headers[SIGNATURE] = key.sign("frame", body_statement(body))
    message = Message(exchange, body, message_id=f"{frame.digest[:8]}-{kind}-{frame.number}", headers=headers)
    return list(split(message, part_bytes=part_bytes or 1, limit_bytes=0 if part_bytes else 1 << 30))


async def publish(transport, pair, *, part_bytes=None, key=None):
    """A keyframe, if there is one, just before the frame of its number. Returns the latter."""
    keyframe, frame = pair
    names = Names(frame.federation)
    for exchange, one in ((names.keyframes, keyframe), (names.model, frame)):
        if one is not None:
            for message in messages(exchange, one, part_bytes=part_bytes, key=key):
                await transport.publish(message)
    return frame
