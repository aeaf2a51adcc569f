"""A worker as a process: follow the model, train, put the update into the outbox, send it, learn from receipts.

It can be killed at any moment: what matters is in the outbox. Training goes on while the broker is away.
"""

import asyncio
import hashlib
import secrets
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import structlog

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.codecs.feedback import give_back
from broker_fl.errors import (
    BrokerUnavailableError,
    DecodeError,
    NotFoundError,
    PublishTimeoutError,
    QueueInUseError,
    UnroutableError,
    UntrustedBrokerError,
    first_of,
)
from broker_fl.failpoints import reach
from broker_fl.parameters import Vector
from broker_fl.privacy.policy import Mechanism
from broker_fl.signing import SIGNATURE, SigningKey, body_statement, is_signed, payload_digest, update_statement
from broker_fl.topology import Names
from broker_fl.transports.following import Follower, ReceivedModel
from broker_fl.transports.model_log import Pending, read_newest
from broker_fl.transports.parts import PART, split
from broker_fl.transports.retry import Backoff
from broker_fl.transports.transport import Connect, Delivery, Header, Message, Subscription, Transport
from schemas import wire
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from schemas.receipt import Receipt
from schemas.update import ModelUpdate
from workers.encoding import Budget, encode_update, fields_bytes
from workers.held import HeldModel, Unkept
from workers.observer import Observer, Unobserved
from workers.outbox import Outbox, StoredUpdate
from workers.participation import is_selected
from workers.privacy import Declined, PlainTraining, PrivacyBudget
from workers.trainer import TrainResult

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_RESEND_AFTER_AT_MOST_S = 3600.0
"""A confirmed update without a receipt is sent again after a while: the aggregator answers what it decided before. The while
doubles as long as nobody answers, so that an aggregator that is away finds few copies."""

_CLOCK_GRACE_S = 60.0
"""What was sent later than that by its mark was marked by another clock, before it was set back."""

_KEEP_AFTER_S = 0.1
"""A model that was received is kept on the disk a moment later, so that training does not wait for it."""

_CARRIED, _NOISED, _PLAIN = "carried", "noised", "plain"
"""A fact of the outbox: whether residual and velocity are all of noised trainings."""

_UPLINK = "uplink_bytes_per_s"
_UPLINK_MEMORY = 0.7
"""The share that earlier updates keep in the measured speed of the line."""

_DIVERGED = 1e6
"""The magnitude of an element from which a training has diverged, though it is finite: no aggregator takes it."""

_REST_S, _REST_AT_MOST_S = 1.0, 60.0
"""After an update that came too soon for the federation; twice as long after each further one in a row."""

_NEVER_TAKEN = ("bounds", "non_finite", "outlier")
"""Reasons for which a content is dropped: in the residual it would be in every later update, and shut the party out for ever."""


class _BudgetPassedError(Exception):
    """Takes the transaction back."""


class Train(Protocol):
    """Local training, bound to the party's task, data and device; runs in a thread."""

    def __call__(
        self, base: Vector, plan: TrainingPlan, *, mechanism: Mechanism | None, seed: int, should_stop: Callable[[], bool]
    ) -> TrainResult | None:
        """With the noise of the mechanism, or plainly without one."""


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    federation: str
    party: str
    manifest: Manifest
    initial: Vector
    """The model that the task's seed draws, shape (manifest.size,)."""
    federation_key: str | None = None
    """The public key that the party was given when it was enrolled: nothing that it did not sign is believed."""
    key: SigningKey | None = None
    """The party's own, which signs its updates."""


@dataclass(frozen=True, slots=True)
class Link:
    """How the worker uses its connection."""

    part_bytes: int
    max_message_bytes: int
    inbox_grace_s: float
    """How long to wait for an inbox that another worker holds: a lost connection lets go of it after some heartbeats."""


class Worker:
    """Runs until the federation is over or `stop` is called."""

    def __init__(
        self,
        connect: Connect,
        outbox: Outbox,
        train: Train,
        privacy: PrivacyBudget,
        *,
        identity: Identity,
        link: Link,
        budget: Budget,
        throttle: float,
        resend_after_s: float,
        clock: Callable[[], float],
        observer: Observer | None = None,
    ) -> None:
        self._connect = connect
        self._outbox = outbox
        self._train = train
        self._privacy = privacy
        self._identity = identity
        self._names = Names(identity.federation)
        self._link = link
        self._budget = budget
        self._throttle = throttle
        self._clock = clock
        self._observer: Observer = observer or Unobserved()
        self._follower = Follower(
            federation=identity.federation,
            manifest=identity.manifest,
            initial=identity.initial,
            name=f"worker:{identity.party}",
            federation_key=identity.federation_key,
            read=self._observer.read,
        )
        self._held = HeldModel(outbox, federation=identity.federation, manifest=identity.manifest)
        self._unkept = Unkept(most_bytes=4 * identity.manifest.size)
        self._newest: ReceivedModel | None = None
        """What the broker says is the newest: a model on the disk may be old."""
        self._was_up = False
        self._left_out: tuple[str, int] | None = None
        self._declined = ""
        self._rest_s = 0.0
        self._changed = asyncio.Event()
        self._update_waits = asyncio.Event()
        self._settling = asyncio.Lock()
        self._resend_at_first_s = self._resend_after_s = resend_after_s
        self._ended = asyncio.Event()
        self._stop_training = threading.Event()
        self._outbox_thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._training_thread = ThreadPoolExecutor(1, thread_name_prefix="train")

    def stop(self) -> None:
        """What is in the outbox stays there; a training that runs is dropped."""
        self._stop_training.set()
        self._ended.set()

    async def run(self) -> None:
        """A broker that is away is waited for.

        Raises AuthenticationError, AccessRefusedError, NotFoundError (not enrolled), UntrustedBrokerError at the start,
        QueueInUseError (another worker serves this party), ManifestMismatchError, StorageError, and ConfigurationError for a
        budget that no update stays within.
        """
        try:
            self._follower.held = await self._in_outbox(self._held.load)
            if self._privacy.is_needed:
                await self._in_outbox(self._privacy.open)
                await self._in_outbox(self._forget_unnoised)
            await self._in_outbox(self._tell_held)
            async with asyncio.TaskGroup() as group:
                services = (self._sessions(), self._train_models(), self._keep_models())
                tasks = [group.create_task(service) for service in services]
                await self._ended.wait()
                self._stop_training.set()
                for task in tasks:
                    task.cancel()
            await self._in_outbox(self._count, self._follower.traffic.take())
            await self._keep_model()
        finally:
            self._stop_training.set()
            for executor in (self._training_thread, self._outbox_thread):
                await asyncio.shield(asyncio.to_thread(executor.shutdown, cancel_futures=True))

    async def _sessions(self) -> None:
        loop = asyncio.get_running_loop()
        backoff = Backoff()
        held_since: float | None = None
        while not self._ended.is_set():
            try:
                async with self._connect(f"worker:{self._identity.party}") as transport:
                    await self._session(transport, backoff)
            except* (NotFoundError, UntrustedBrokerError) as missing:
                if not self._was_up:
                    raise
                # A broker that starts again may not know its vhost or queues for a while.
                log.warning("not there now, trying again", reason=str(first_of(missing)), wait_s=round(backoff.next_s, 1))
            except* (BrokerUnavailableError, PublishTimeoutError, UnroutableError) as lost:
                held_since = None
                log.warning("no broker, trying again", reason=str(first_of(lost)), wait_s=round(backoff.next_s, 1))
            except* QueueInUseError as held:
                held_since = held_since or loop.time()
                if loop.time() - held_since > self._link.inbox_grace_s:
                    raise QueueInUseError(f"another worker already serves party {self._identity.party!r}") from held
                log.warning("the inbox is held by another worker, or by a lost connection: waiting", party=self._identity.party)
            await backoff.wait(unless=self._ended)

    async def _session(self, transport: Transport, backoff: Backoff) -> None:
        """Until the connection is lost. The inbox is held alone, so that two workers can't serve one party."""
        name = f"worker:{self._identity.party}"
        inbox = transport.consume(self._names.inbox(self._identity.party), prefetch=16, name=name, exclusive=True)
        async with inbox as receipts, self._observed_connection(), asyncio.TaskGroup() as group:
            self._was_up = True
            backoff.reset()
            log.info("connected", party=self._identity.party, federation=self._identity.federation)
            pending = self._follower.new_pending()
            group.create_task(self._read_receipts(receipts))
            group.create_task(self._read_log(transport, pending))
            group.create_task(self._follow(transport, pending, receipts))
            group.create_task(self._send_updates(transport))

    async def _read_log(self, transport: Transport, pending: Pending) -> None:
        name = f"worker:{self._identity.party}"
        reading = read_newest(transport, self._names.model_log, name=name, traffic=self._follower.traffic)
        async with aclosing(reading) as broadcasts:
            async for broadcast in broadcasts:
                pending.put(broadcast)

    async def _follow(self, transport: Transport, pending: Pending, receipts: Subscription) -> None:
        while True:
            progress = await self._follower.next(transport, pending)
            await self._in_outbox(self._count, self._follower.traffic.take())
            if progress is None:
                continue
            reach("worker.received")
            self._unkept.add(progress)
            self._newest = received = progress.received
            self._changed.set()
            self._observer.has_version(received.version)
            if progress.is_anew or progress.bodies:
                how = {"frames": len(progress.bodies), "anew": progress.is_anew}
                log.info("model received", version=received.version, number=received.number, over=received.over, **how)
            if received.over:
                log.info("the federation is over", version=received.version)
                self._stop_training.set()
                await self._read_last_receipts(receipts)
                self.stop()

    async def _keep_models(self) -> None:
        while True:
            await self._unkept.wait()
            await asyncio.sleep(_KEEP_AFTER_S)
            # What was taken is on its way to the disk, also where this task ends meanwhile.
            await asyncio.shield(self._keep_model())

    async def _keep_model(self) -> None:
        taken = self._unkept.take()
        if taken is not None:
            await self._in_outbox(self._held.keep, *taken)

    async def _read_receipts(self, receipts: Subscription) -> None:
        while True:
            await self._take_receipt(receipts, await receipts.receive())

    async def _read_last_receipts(self, receipts: Subscription) -> None:
        """They were sent before the last frame: what is to come is here already."""
        while (delivery := receipts.receive_nowait()) is not None:
            await self._take_receipt(receipts, delivery)
        async with self._settling:
            return  # `_read_receipts` may have held one.

    async def _take_receipt(self, receipts: Subscription, delivery: Delivery) -> None:
        async with self._settling:
            try:
                receipt = self._receipt(delivery)  # A tenth of a millisecond: a thread would take as long.
            except DecodeError as exc:
                log.warning("receipt left out", reason=str(exc))
            else:
                reach("worker.receipt")
                await self._in_outbox(self._settle, receipt)
                reach("worker.settled")
                self._resend_after_s = self._resend_at_first_s
                self._changed.set()
            await receipts.acknowledge(delivery.tag)

    def _receipt(self, delivery: Delivery) -> Receipt:
        key, signature = self._identity.federation_key, delivery.headers.get(SIGNATURE)
        if key is not None and not is_signed("receipt", body_statement(delivery.body), signature, by=key):
            raise DecodeError(f"it is not signed by the federation's key {key[:12]}")
        receipt = wire.decode(Receipt, delivery.body)
        # What is signed once goes for ever: what was said to another party must not settle ours.
        if (receipt.federation, receipt.party) != (self._identity.federation, self._identity.party):
            raise DecodeError(f"it is for party {receipt.party!r} of federation {receipt.federation!r}")
        return receipt

    def _settle(self, receipt: Receipt) -> None:
        """In the outbox's thread. What was refused goes back into the residual, in the transaction that forgets the update."""
        stored = self._outbox.unsettled(receipt.update_id)
        if stored is None:
            return
        facts = {"update": receipt.update_id[:8], "version": receipt.version, "staleness": receipt.staleness}
        self._rest_s = min(_REST_AT_MOST_S, max(_REST_S, 2 * self._rest_s)) if receipt.reason == "rate" else 0.0
        if receipt.outcome == "refused":
            log.warning("update refused", reason=receipt.reason, detail=receipt.detail, **facts)
        else:
            less = {"reason": receipt.reason, "detail": receipt.detail} if receipt.reason is not None else {}
            log.info(f"update {receipt.outcome}", weight=round(receipt.weight, 4), **less, **facts)
        with self._outbox.transaction():
            if receipt.reason in _NEVER_TAKEN:
                log.warning("its content is dropped, since no update with it would be taken", update=stored.update_id[:8])
                self._outbox.count({"updates_dropped": 1})
            elif receipt.outcome == "refused":
                self._return_to_residual(stored)
            self._outbox.settle(receipt.update_id)
            self._outbox.count({f"updates_{receipt.outcome}": 1})
        self._observer.settled(receipt)
        self._observer.has_unsettled(self._outbox.unsettled_count())

    def _return_to_residual(self, stored: StoredUpdate) -> None:
        manifest = self._identity.manifest
        update = wire.decode(ModelUpdate, stored.body)
        if update.manifest_digest != manifest.digest:
            log.warning("the refused update was another model's: its content is dropped", update=stored.update_id[:8])
            return
        if update.privacy is None and self._outbox.fact(_CARRIED) == _NOISED:
            log.warning("the refused update was trained without noise: its content is dropped", update=stored.update_id[:8])
            self._outbox.count({"updates_dropped": 1})
            return
        refused = decode(update.payload, parse_codec(update.codec), manifest=manifest)
        residual = self._outbox.residual(manifest.digest)
        self._outbox.set_residual(
            manifest.digest, give_back(np.zeros(manifest.size, np.float32) if residual is None else residual, refused)
        )

    async def _send_updates(self, transport: Transport) -> None:
        while True:
            self._update_waits.clear()
            now, is_resending = self._clock(), False
            due = partial(self._outbox.to_send, sent_before=now - self._resend_after_s, now=now + _CLOCK_GRACE_S)
            while (stored := await self._in_outbox(due)) is not None:
                is_resending = is_resending or stored.sent_at is not None
                await self._send(transport, stored)
            if is_resending:
                self._resend_after_s = min(2 * self._resend_after_s, max(self._resend_at_first_s, _RESEND_AFTER_AT_MOST_S))
            try:
                async with asyncio.timeout(self._resend_after_s):
                    await self._update_waits.wait()
            except TimeoutError:
                continue

    async def _send(self, transport: Transport, stored: StoredUpdate) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        message = await asyncio.to_thread(self._message, stored)
        parts = split(message, part_bytes=self._link.part_bytes, limit_bytes=self._link.max_message_bytes)
        # In a thread: the first part comes when the digest of all of them is made.
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            await transport.publish(part)
            if PART in part.headers:
                reach("worker.part")
        self._observer.sent(stored.codec, len(stored.body))
        reach("worker.sent")
        await self._in_outbox(self._mark_sent, stored, loop.time() - began)

    def _message(self, stored: StoredUpdate) -> Message:
        """In a thread: it is signed, by the key that the party has now."""
        headers: dict[str, Header] = {
            "x-fl-party": self._identity.party,
            "x-fl-sequence": stored.sequence,
            "x-fl-base-version": stored.base_version,
            "x-fl-codec": stored.codec,
            "x-fl-bytes": len(stored.body),
            "x-fl-at": int(self._clock() * 1000),
        }
        if self._identity.key is not None:
            update = wire.decode(ModelUpdate, stored.body)
            statement = update_statement(update, payload_digest=payload_digest(update.payload))
            headers[SIGNATURE] = self._identity.key.sign("update", statement)
        return Message(self._names.up(self._identity.party), stored.body, message_id=stored.update_id, headers=headers)

    def _mark_sent(self, stored: StoredUpdate, seconds: float) -> None:
        with self._outbox.transaction():
            self._outbox.mark_sent(stored.update_id, at=self._clock())
            self._outbox.count({"updates_sent": 1, "bytes_up": len(stored.body)})
            if seconds > 0:
                self._outbox.set_fact(_UPLINK, repr(self._measured(len(stored.body) / seconds)))

    def _measured(self, bytes_per_s: float) -> float:
        """A running mean, in which the newest updates count most."""
        known = self._uplink()
        return bytes_per_s if known is None else _UPLINK_MEMORY * known + (1 - _UPLINK_MEMORY) * bytes_per_s

    def _uplink(self) -> float | None:
        """Bytes per second that the broker confirmed; None before the first update."""
        fact = self._outbox.fact(_UPLINK)
        return None if fact is None else float(fact)

    def _count(self, added: dict[str, int]) -> None:
        with self._outbox.transaction():
            self._outbox.count(added)

    async def _train_models(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._rest_s)
            received, mechanism = await self._next_to_train()
            sequence = await self._in_outbox(self._outbox.next_sequence)
            # Whoever can draw a noised training's seed again can take its noise off.
            seed = seed_of(self._identity.party, sequence) if mechanism is None else secrets.randbits(128)
            began = loop.time()
            training = partial(self._train, mechanism=mechanism, seed=seed, should_stop=self._stop_training.is_set)
            plan = received.plan.training.at(received.version)
            result = await loop.run_in_executor(self._training_thread, training, received.model, plan)
            if result is None:
                return
            await asyncio.sleep((self._throttle - 1) * (loop.time() - began))
            self._observer.trained(loop.time() - began)
            if await asyncio.to_thread(_has_diverged, result):
                log.error("training diverged: nothing is sent, and the next model is waited for", version=received.version)
                self._left_out = (received.ledger, received.version)
                await self._in_outbox(self._leave_diverged, received, mechanism)
                continue
            reach("worker.trained")
            stored = await self._in_outbox(self._keep, received, result, sequence, mechanism)
            reach("worker.kept")
            if stored is None:
                self._left_out = (received.ledger, received.version)
                continue
            log.info(
                "trained",
                base_version=received.version,
                loss=round(result.mean_loss, 4),
                steps=result.num_steps,
                seconds=round(loop.time() - began, 2),
                codec=stored.codec,
                bytes=len(stored.body),
            )
            self._update_waits.set()

    async def _next_to_train(self) -> tuple[ReceivedModel, Mechanism | None]:
        while True:
            self._changed.clear()
            received = self._newest
            if received is not None and await self._in_outbox(self._may_train, received):
                mechanism = await self._in_outbox(self._mechanism_for, received)
                if not isinstance(mechanism, Declined):
                    return received, mechanism
            await self._changed.wait()

    def _mechanism_for(self, received: ReceivedModel) -> Mechanism | Declined | None:
        """Said once for each reason: without training, the model is followed until the federation is over."""
        mechanism = self._privacy.mechanism_for(received.plan, received.plan.training.at(received.version))
        reason = mechanism.reason if isinstance(mechanism, Declined) else ""
        if reason and reason != self._declined:
            log.warning("no training, the model is followed", reason=reason)
            self._count({"trainings_declined": 1})
            self._tell_spent()
        self._declined = reason
        if isinstance(mechanism, Mechanism):
            self._forget_unnoised()
        return None if isinstance(mechanism, PlainTraining) else mechanism

    def _may_train(self, received: ReceivedModel) -> bool:
        """Once from each version; where the strategy lets a party repeat, again when the last update is settled."""
        if received.over or self._left_out == (received.ledger, received.version):
            return False
        if not is_selected(
            federation=self._identity.federation,
            party=self._identity.party,
            version=received.version,
            number=received.number,
            fraction=received.plan.fraction,
        ):
            return False
        if self._outbox.fact("trained_from") != f"{received.ledger}/{received.version}":
            return True
        return received.plan.repeat and self._outbox.unsettled_count() == 0

    def _leave_diverged(self, received: ReceivedModel, mechanism: Mechanism | None) -> None:
        """That nothing is sent is seen too: noised trainings that diverge cost what they cost."""
        with self._outbox.transaction():
            self._outbox.count({"trainings_diverged": 1})
            if mechanism is not None:
                self._privacy.record(mechanism, ledger=received.ledger, base_version=received.version, update_id=None)
        self._tell_spent()

    def _keep(
        self, received: ReceivedModel, result: TrainResult, sequence: int, mechanism: Mechanism | None
    ) -> StoredUpdate | None:
        """In the outbox's thread: encode, and store update, residual, velocity, counters and what the training cost in one
        transaction. None, and nothing of it, where another worker spent the rest of the budget meanwhile."""
        manifest = self._identity.manifest
        update_id = uuid.uuid4().hex
        encoded = encode_update(
            result.delta,
            residual=self._outbox.residual(manifest.digest),
            velocity=self._outbox.velocity(manifest.digest),
            plan=received.plan,
            manifest=manifest,
            budget=self._budget,
            uplink_bytes_per_s=self._uplink(),
            fields_bytes=fields_bytes(
                federation=self._identity.federation, party=self._identity.party, is_noised=mechanism is not None
            ),
            generator=np.random.default_rng(int(update_id, 16)),
        )
        update = ModelUpdate(
            federation=self._identity.federation,
            ledger=received.ledger,
            party=self._identity.party,
            update_id=update_id,
            sequence=sequence,
            base_version=received.version,
            base_digest=received.digest,
            manifest_digest=manifest.digest,
            codec=encoded.codec.name,
            num_samples=result.num_samples,
            num_steps=result.num_steps,
            train_loss=result.mean_loss if mechanism is None else None,
            privacy=None if mechanism is None else mechanism.facts,
            payload=encoded.payload,
        )
        stored = StoredUpdate(sequence, update_id, wire.encode(update), received.version, update.codec)
        try:
            with self._outbox.transaction():
                self._outbox.add(stored)
                self._outbox.set_residual(manifest.digest, encoded.residual)
                self._outbox.set_velocity(manifest.digest, encoded.velocity)
                self._outbox.set_fact("trained_from", f"{received.ledger}/{received.version}")
                self._outbox.count({"trainings": 1, "steps": result.num_steps})
                if mechanism is not None:
                    self._spend(mechanism, received, update_id)
                else:
                    self._outbox.set_fact(_CARRIED, _PLAIN)
                reach("worker.spent")
        except _BudgetPassedError as passed:
            log.warning("a training is dropped: another worker on the same data spent what it needs", reason=str(passed))
            return None
        self._tell_spent()
        self._observer.has_unsettled(self._outbox.unsettled_count())
        return stored

    def _spend(self, mechanism: Mechanism, received: ReceivedModel, update_id: str) -> None:
        self._privacy.record(mechanism, ledger=received.ledger, base_version=received.version, update_id=update_id)
        passed = None if received.plan.privacy is None else self._privacy.passed(received.plan.privacy)
        if passed is not None:
            raise _BudgetPassedError(passed)

    def _forget_unnoised(self) -> None:
        """What trainings without noise left behind, and was not sent: it must not ride in updates that are paid for as noised."""
        if self._outbox.fact(_CARRIED) == _NOISED:
            return
        plain = [stored for stored in self._outbox.all_unsettled() if wire.decode(ModelUpdate, stored.body).privacy is None]
        with self._outbox.transaction():
            self._outbox.clear_carried()
            for stored in plain:
                self._outbox.settle(stored.update_id)
            if plain:
                self._outbox.count({"updates_dropped": len(plain)})
            self._outbox.set_fact(_CARRIED, _NOISED)
        if plain:
            log.warning("updates without noise are dropped, since noise is asked for now", updates=len(plain))

    @asynccontextmanager
    async def _observed_connection(self) -> AsyncIterator[None]:
        self._observer.connected(True)
        try:
            yield
        finally:
            self._observer.connected(False)

    def _tell_held(self) -> None:
        """What was there at the start."""
        if self._follower.held is not None:
            self._observer.has_version(self._follower.held.version)
        self._observer.has_unsettled(self._outbox.unsettled_count())
        self._tell_spent()

    def _tell_spent(self) -> None:
        epsilon = self._privacy.epsilon()
        if epsilon is not None:
            self._observer.has_spent(epsilon)

    async def _in_outbox(self, call: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._outbox_thread, call, *arguments)


def _has_diverged(result: TrainResult) -> bool:
    return not (np.isfinite(result.mean_loss) and np.abs(result.delta).max() < _DIVERGED)


def seed_of(party: str, sequence: int) -> int:
    """Of a local training: the same for the same party and sequence number, below 2**63."""
    return int.from_bytes(hashlib.sha256(f"{party}/{sequence}".encode()).digest()[:8], "big") >> 1
