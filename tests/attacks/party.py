"""A party's valid credentials, and what one who holds them can do without our worker."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from secrets import token_hex

import numpy as np
from pamqp.commands import Basic
from raw_amqp import ClosedError, RawConnection, publishing, raw_connection

from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.signing import SIGNATURE, SigningKey, payload_digest, update_statement
from broker_fl.topology import Names
from schemas import wire
from schemas.manifest import Manifest
from schemas.receipt import Receipt
from schemas.update import ModelUpdate

SPARSE = "topk:0.001+float32"
_CHOSEN = 20
"""Elements, of which that codec sends all."""

_QUIET_S = 0.03
"""A log that gives nothing for so long has no more."""
_FRESH_S = 3.0


@dataclass(frozen=True, slots=True)
class Frame:
    """The newest that the model log has."""

    ledger: str
    version: int
    number: int
    digest: str
    headers: dict[str, object]
    body: bytes


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that is ready to go."""

    exchange: str
    body: bytes
    properties: Basic.Properties

    @property
    def frames(self) -> bytes:
        return publishing(self.exchange, self.body, self.properties)


@dataclass
class Party:
    name: str
    password: str = field(repr=False)
    key: SigningKey
    url: str = field(repr=False)
    names: Names
    manifest: Manifest
    scale: float
    """The L2 norm of what others send, as it learns by training itself."""
    receipts: dict[str, Receipt] = field(default_factory=dict)
    receipt_messages: dict[str, tuple[bytes, object]] = field(default_factory=dict, repr=False)
    """Bodies and signatures, by update id."""
    closed_at: float | None = None
    """When the broker closed the connection that listens."""
    _frame: Frame | None = None
    _framed_at: float = 0.0
    _sequence: int = 0

    @property
    def exchange(self) -> str:
        return self.names.up(self.name)

    @asynccontextmanager
    async def raw(self, **other: str) -> AsyncIterator[RawConnection]:
        async with raw_connection(self.url, user=self.name, password=self.password, **other) as raw:
            yield raw

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[RawConnection]:
        async with self.raw() as raw:
            await raw.confirms()
            yield raw

    # Receipts

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Takes every receipt, for as long as the broker lets it."""
        async with self.raw() as raw:
            raw.send(Basic.Consume(queue=self.names.inbox(self.name), no_ack=True))
            await raw.expect(Basic.ConsumeOk)
            task = asyncio.create_task(self._listen(raw))
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _listen(self, raw: RawConnection) -> None:
        while self.closed_at is None:
            try:
                _, header, body = await raw.next_message()
            except TimeoutError:
                continue
            except ClosedError:
                self.closed_at = time.time()
                return
            update_id, headers = str(header.properties.message_id), header.properties.headers or {}
            self.receipt_messages[update_id] = (body, headers.get(SIGNATURE))
            self.receipts[update_id] = wire.decode(Receipt, body)

    async def receipt(self, update_id: str, *, within_s: float = 30.0) -> Receipt:
        async with asyncio.timeout(within_s):
            while update_id not in self.receipts:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return self.receipts[update_id]

    # Frames

    async def newest_frame(self) -> Frame:
        return (await self.frames())[-1]

    async def frames(self, since: str = "last") -> list[Frame]:
        """Of the model log, which a party may read: the newest, or those of the last few seconds, as in "5s"."""
        async with self.raw() as raw:
            raw.send(Basic.Qos(prefetch_count=1000))
            raw.send(Basic.Consume(queue=self.names.model_log, arguments={"x-stream-offset": since}))
            found: list[Frame] = []
            with suppress(TimeoutError):
                while True:
                    _, header, body = await raw.next_message(within_s=_QUIET_S if found else 10.0)
                    headers = dict(header.properties.headers or {})
                    ledger, digest = str(headers["x-fl-ledger"]), str(headers["x-fl-digest"])
                    number, version = int(headers["x-fl-number"]), int(headers["x-fl-version"])
                    found.append(Frame(ledger, version, number, digest, headers, body))
        return found

    async def base(self) -> Frame:
        """A frame to train from: of this moment, or a few seconds old."""
        if self._frame is None or time.monotonic() - self._framed_at > _FRESH_S:
            self._frame, self._framed_at = await self.newest_frame(), time.monotonic()
        return self._frame

    # Updates

    def delta(self, *, seed: int = 0, times: float = 1.0) -> np.ndarray:
        """Of the usual norm, or so many times it; few elements, drawn at random."""
        generator = np.random.default_rng(seed)
        vector = np.zeros(self.manifest.size, np.float32)
        vector[generator.choice(vector.size, _CHOSEN, replace=False)] = generator.standard_normal(_CHOSEN)
        return vector * np.float32(times * self.scale / np.linalg.norm(vector))

    def payload(self, vector: np.ndarray, codec: str = "float32") -> bytes:
        return encode(vector, parse_codec(codec), manifest=self.manifest, generator=np.random.default_rng(0))

    async def update(self, payload: bytes | None = None, **changes: object) -> ModelUpdate:
        """One that is right in all but the `changes`."""
        frame = await self.base()
        self._sequence += 1
        fields: dict[str, object] = {
            "federation": self.names.federation,
            "ledger": frame.ledger,
            "party": self.name,
            "update_id": token_hex(16),
            "sequence": self._sequence,
            "base_version": frame.version,
            "base_digest": frame.digest,
            "manifest_digest": self.manifest.digest,
            "codec": SPARSE if payload is None else "float32",
            "num_samples": 240,
            "num_steps": 8,
            "train_loss": 0.5,
            "payload": self.payload(self.delta(), SPARSE) if payload is None else payload,
        }
        return ModelUpdate.model_construct(**{**ModelUpdate.model_construct(**fields).model_dump(), **changes})

    def signature(self, update: ModelUpdate, key: SigningKey | None = None) -> str:
        statement = update_statement(update, payload_digest=payload_digest(update.payload))
        return (key or self.key).sign("update", statement)

    def letter(self, update: ModelUpdate, *, key: SigningKey | None = None, **properties: object) -> Letter:
        """Signed, from this party, through its own exchange. `properties` replace what a worker would say."""
        usual = {"message_id": update.update_id, "headers": {SIGNATURE: self.signature(update, key)}}
        return self.letter_of(wire.encode(update), **{**usual, **properties})

    def letter_of(self, body: bytes, **properties: object) -> Letter:
        usual: dict[str, object] = {
            "user_id": self.name,
            "message_id": token_hex(16),
            "delivery_mode": 2,
            "content_type": "application/msgpack",
            "headers": {},
        }
        return Letter(self.exchange, body, Basic.Properties(**{**usual, **properties}))

    async def sends(self, letter: Letter) -> str:
        """What becomes of it: of its receipt, or what the broker says. As in "refused: codec"."""
        outcome = await self.posts(letter)
        if outcome != "confirmed":
            return outcome
        return told(await self.receipt(str(letter.properties.message_id)))

    async def posts(self, *letters: Letter) -> str:
        """The broker's word alone."""
        try:
            async with self.publisher() as raw:
                for letter in letters:
                    outcome = await raw.publish(letter.exchange, letter.body, letter.properties)
        except ClosedError as exc:
            return str(exc)
        return outcome

    async def login_is_closed(self) -> str:
        """What the broker says to a new login; empty where it lets the party in."""
        try:
            async with self.raw():
                return ""
        except ClosedError as exc:
            return str(exc)


def told(receipt: Receipt) -> str:
    return receipt.outcome if receipt.reason is None else f"{receipt.outcome}: {receipt.reason}"
