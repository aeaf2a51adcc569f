"""The model that a worker holds, on its disk: whole, and the frames that changed it since.

So a worker that comes back reads what changed while it was away, and not a whole model.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import structlog

from broker_fl.errors import DecodeError, ManifestMismatchError
from broker_fl.parameters import digest
from broker_fl.transports.following import Progress, ReceivedModel, advance, parse_frame
from schemas import wire
from schemas.frame import Plan
from schemas.manifest import Manifest
from workers.outbox import Outbox, StoredModel

_MOST_FRAMES = 256
"""Applied at a start; more of them, or more bytes than the model has, and it is kept whole again."""

log = structlog.get_logger(__name__)


class HeldModel:
    """In the outbox's database, for the outbox's thread."""

    def __init__(self, outbox: Outbox, *, federation: str, manifest: Manifest) -> None:
        self._outbox = outbox
        self._federation = federation
        self._manifest = manifest
        self._is_kept = False
        self._frames = 0
        self._bytes = 0

    def load(self) -> ReceivedModel | None:
        """To the last bit what was held; what is another model's or damaged is reported, dropped, and not used."""
        stored, bodies = self._outbox.held_model(), self._outbox.held_frames()
        if stored is None:
            return None
        if stored.manifest != self._manifest.digest:
            log.info("the model on the disk is of another task: dropped")
            self._drop()
            return None
        try:
            received = self._restored(stored, bodies)
        except (DecodeError, ManifestMismatchError) as exc:
            log.warning("the model on the disk is damaged: dropped, it will be read again from the broker", reason=str(exc))
            self._drop()
            return None
        self._is_kept, self._frames, self._bytes = True, len(bodies), sum(map(len, bodies))
        return received

    def _restored(self, stored: StoredModel, bodies: Sequence[bytes]) -> ReceivedModel:
        if len(stored.vector) != 4 * self._manifest.size:
            raise DecodeError(f"{len(stored.vector)} bytes are no model of {self._manifest.size} parameters")
        start = ReceivedModel(
            ledger=stored.ledger,
            number=stored.number,
            version=stored.version,
            digest=stored.digest,
            over=stored.over,
            log_bytes=stored.log_bytes,
            plan=wire.decode(Plan, stored.plan),
            model=np.frombuffer(stored.vector, "<f4").astype(np.float32),
        )
        frames = [parse_frame(body, federation=self._federation, manifest=self._manifest) for body in bodies]
        received = advance(start, frames, manifest=self._manifest)
        if received.model is start.model and digest(start.model) != start.digest:
            raise DecodeError("the model is not what its digest says")
        return received

    def _drop(self) -> None:
        with self._outbox.transaction():
            self._outbox.set_held_model(None)

    def keep(self, received: ReceivedModel, bodies: Sequence[bytes] | None) -> None:
        """One transaction. `bodies` lead to it from what was kept before; None: keep it whole."""
        if bodies is None or not self._is_kept or self._is_cheaper_whole(bodies):
            self._keep_whole(received)
            return
        with self._outbox.transaction():
            for body in bodies:
                self._outbox.add_held_frame(body)
        self._frames += len(bodies)
        self._bytes += sum(map(len, bodies))

    def _is_cheaper_whole(self, bodies: Sequence[bytes]) -> bool:
        return self._frames + len(bodies) > _MOST_FRAMES or self._bytes + sum(map(len, bodies)) > 4 * self._manifest.size

    def _keep_whole(self, received: ReceivedModel) -> None:
        stored = StoredModel(
            manifest=self._manifest.digest,
            ledger=received.ledger,
            number=received.number,
            version=received.version,
            digest=received.digest,
            over=received.over,
            log_bytes=received.log_bytes,
            plan=wire.encode(received.plan),
            vector=received.model.astype("<f4", copy=False).tobytes(),
        )
        with self._outbox.transaction():
            self._outbox.set_held_model(stored)
        self._is_kept, self._frames, self._bytes = True, 0, 0


class Unkept:
    """What the disk lacks of the newest model; for the event loop. Where it would outgrow the model, that is kept whole."""

    def __init__(self, *, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._newest: ReceivedModel | None = None
        self._bodies: list[bytes] | None = []
        self._filled = asyncio.Event()

    def add(self, progress: Progress) -> None:
        self._newest = progress.received
        if progress.is_anew or self._bodies is None:
            self._bodies = None
        else:
            self._bodies.extend(progress.bodies)
            if sum(map(len, self._bodies)) > self._most_bytes:
                self._bodies = None
        if self._bodies != []:
            self._filled.set()

    async def wait(self) -> None:
        await self._filled.wait()

    def take(self) -> tuple[ReceivedModel, list[bytes] | None] | None:
        """As `HeldModel.keep` takes it; None if the disk lacks nothing."""
        if self._newest is None or not self._filled.is_set():
            return None
        taken = (self._newest, self._bodies)
        self._bodies = []
        self._filled.clear()
        return taken
