"""What the receivers hold, made again from the ledger: from a whole model, by the frames after it."""

from collections.abc import Iterator
from typing import Protocol

from aggregator.ledger import Ledger
from aggregator.merging.fold import State, Strategy, remember_base
from aggregator.records import FrameRow
from broker_fl.codecs.chain import change, rounded, whole_model
from broker_fl.errors import BrokerFLError, DamagedError, DecodeError
from broker_fl.parameters import Vector
from schemas import wire
from schemas.frame import ModelFrame
from schemas.manifest import Manifest


def changed_by(ledger: Ledger, model: Vector, *, after: int, manifest: Manifest) -> Iterator[ModelFrame]:
    """Each frame after that number, when it has changed the model, in place. Raises DamagedError naming the frame."""
    for number, body in ledger.bodies_after(after):
        if number != after + 1:
            raise DamagedError(f"{ledger.name}: frame {after + 1} has lost its body; restore it from a backup")
        try:
            frame = wire.decode(ModelFrame, body)
            if (frame.number, frame.base) not in ((number, after), (number, None)):
                raise DecodeError(f"it says that it changes frame {frame.base} to {frame.number}")
            if frame.base is not None:
                change(model, frame, manifest=manifest)
        except BrokerFLError as exc:
            raise DamagedError(f"{ledger.name}: the body of frame {number} is damaged: {exc}") from exc
        if frame.base is None:
            model[:] = start_of_chain(ledger, number, manifest=manifest)[1]
        after = number
        yield frame


def start_of_chain(ledger: Ledger, number: int, *, manifest: Manifest) -> tuple[ModelFrame, Vector]:
    """What the receivers hold after this frame, from which the changes go on. Raises DamagedError."""
    body = ledger.start(number)
    if body is None:
        raise DamagedError(f"{ledger.name} has lost the whole model of frame {number}; restore it from a backup")
    return open_whole(ledger, number, body, manifest=manifest)


def open_whole(ledger: Ledger, number: int, body: bytes, *, manifest: Manifest) -> tuple[ModelFrame, Vector]:
    try:
        frame = wire.decode(ModelFrame, body)
        return frame, whole_model(frame, manifest=manifest)
    except BrokerFLError as exc:
        raise DamagedError(f"{ledger.name}: the keyframe of frame {number} is damaged: {exc}") from exc


def held_anew(row: FrameRow, model: Vector, *, manifest: Manifest) -> Vector:
    """What the receivers hold after a frame without a base that was made of this model; a new vector."""
    return model.copy() if row.rounding is None else rounded(model, row.rounding, manifest=manifest)[1]


class Bases(Protocol):
    def add(self, strategy: Strategy, state: State) -> State:
        """With the broadcast model of its version, where there was one and the strategy needs it."""


class OwnBases:
    """What would have been broadcast if another model had come of the same versions, but for what codecs leave out."""

    def __init__(self, ledger: Ledger) -> None:
        self._versions = {frame.version for frame in ledger.frames_from(0)}

    def add(self, strategy: Strategy, state: State) -> State:
        if not strategy.keeps_bases or state.version in state.bases or state.version not in self._versions:
            return state
        return remember_base(strategy, state, broadcast=state.model.copy())


class BroadcastBases:
    """The broadcast models that model mixing needs again, made anew where replay passes a version that was broadcast."""

    def __init__(self, ledger: Ledger, manifest: Manifest) -> None:
        self._ledger = ledger
        self._manifest = manifest
        self._numbers: dict[int, int] | None = None
        self._model: Vector | None = None
        self._frames: Iterator[ModelFrame] = iter(())
        self._number = 0

    def add(self, strategy: Strategy, state: State) -> State:
        if not strategy.keeps_bases or state.version in state.bases:
            return state
        if self._numbers is None:
            self._numbers = {frame.version: frame.number for frame in self._ledger.frames_from(0)}
        number = self._numbers.get(state.version)
        if number is None:
            return state
        model = self._model
        if model is None:
            model = self._model = self._begin(state, self._numbers)
        while self._number < number:
            frame = next(self._frames, None)
            if frame is None:
                raise DamagedError(f"{self._ledger.name}: frame {number} has lost its body; restore it from a backup")
            self._number = frame.number
        return remember_base(strategy, state, broadcast=model.copy())

    def _begin(self, state: State, numbers: dict[int, int]) -> Vector:
        """At the newest base of the snapshot, or at a start of the chain that is nearer; compaction leaves no frames before
        that.
        """
        starts = self._ledger.starts()
        if not starts:
            raise DamagedError(f"{self._ledger.name} has lost the whole model of its first frame; restore it from a backup")
        nearest = max((start for start in starts if start <= numbers[state.version]), default=starts[0])
        known = max((version for version in state.bases if version in numbers), default=None)
        if known is not None and numbers[known] >= nearest:
            self._number, model = numbers[known], state.bases[known].copy()
        else:
            self._number, model = nearest, start_of_chain(self._ledger, nearest, manifest=self._manifest)[1]
        self._frames = changed_by(self._ledger, model, after=self._number, manifest=self._manifest)
        return model
