"""The state of the federation and the ledger, kept in step: what is decided here is decided once.

Everything in this room runs in one thread, one call at a time. After an error in the middle of a decision the state in memory is
not to be trusted: the process ends, or opens the state again from snapshot and ledger.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import structlog

from aggregator.admission import Credentials, Examined, Limits, Refused, RolledBack, Sender, admit, examine
from aggregator.broadcast import BroadcastPlan, Held, exact_keyframe, has_passed, is_due, make_frame
from aggregator.client_privacy import WARNING
from aggregator.decisions import (
    Arrival,
    Goal,
    PartBody,
    Verdict,
    accepted_entry,
    party_entry,
    receipt_for,
    refused_entry,
    suspension_entry,
)
from aggregator.ledger import FEDERATION_KEY, Ledger
from aggregator.merging.fold import Contribution, State, Strategy, remember_base
from aggregator.merging.strategies import build_strategy
from aggregator.party_spending import PartySpending
from aggregator.records import Entry, FrameRow, Lead, SnapshotRow
from aggregator.recovery import recover, recover_held
from aggregator.snapshots import Snapshots, Stored, epoch_of
from aggregator.spool import Spool
from aggregator.trust import REMEMBERED_ENTRIES, Judgement, Suspension, Trust, signed_membership_of
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.errors import ConfigurationError, DamagedError, ManifestMismatchError
from broker_fl.failpoints import reach
from broker_fl.parameters import Vector, digest, fingerprint
from broker_fl.signing import payload_digest
from schemas.membership import SignedMembership

log = structlog.get_logger(__name__)

_EXPIRE_EVERY_S = 30.0
_LOOK_EVERY_S = 1.0
"""How often a leader that has nothing to write looks whether it still leads."""
_Decided = dict[tuple[str, str], Entry]


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a federation's settings come to for its coordinator."""

    limits: Limits
    merging: MergingSettings
    plan: BroadcastPlan
    goal: Goal
    snapshot_every_versions: int
    parts_expire_s: float
    trust: TrustSettings | None = None
    """None: all parties alike, whatever they send."""
    federation_key: str | None = None
    """The public key that frames and memberships are signed by; None where none are."""


class Coordinator:
    def __init__(
        self, ledger: Ledger, snapshots: Snapshots, rules: Rules, *, clock: Clock, holder: str = "an aggregator"
    ) -> None:
        """`holder` is what others read about who leads the ledger, there and in RabbitMQ's console."""
        self._ledger = ledger
        self._snapshots = snapshots
        self._rules = rules
        self._plan = rules.plan
        self._clock = clock
        self.holder = holder
        self._spool = Spool(ledger, max_update_bytes=rules.limits.max_update_bytes)
        self._strategy: Strategy = build_strategy(rules.merging, noise_key=ledger.noise_key())
        self._state = State(version=0, model=np.empty(0, dtype=np.float32))
        self._model_digest = ""
        self._seq = 0
        self._snapshot_version = self._snapshot_seq = 0
        self._held: Held | None = None
        self._frame_digests: dict[int, str] = {}
        self._rolled_back: list[RolledBack] = []
        self._privacy: PartySpending | None = None
        self._trust: Trust | None = None
        self._buffer_since: float | None = None
        self._expired_at = self._looked_at = 0.0
        self.counts: Counter[str] = Counter()

    def open(self, initial: Vector) -> None:
        """Takes the ledger's lead, and goes on from the first model, or from where the last leader ended; whatever this one
        knew before is made anew. Raises DamagedError, ManifestMismatchError.
        """
        # Before anybody is fenced: whoever is here by mistake must not stop those at work.
        self._check_identity(self._ledger.facts())
        self._ledger.take_lead(self.holder, at=self._clock())
        reach("aggregator.lead")
        facts = self._ledger.facts()
        self._check_identity(facts)
        self._held = None
        if "manifest" not in facts:
            self._begin(initial)
        else:
            self._recover()
            if FEDERATION_KEY not in facts and self._rules.federation_key is not None:
                with self._ledger.transaction():
                    self._pin_key()
        self._rolled_back = [RolledBack(entry.base_version or 0, entry.version) for entry in self._ledger.entries_of("rollback")]
        demands = self._rules.limits.privacy
        self._privacy = None if demands is None else PartySpending(demands, self._ledger.spent_by_party())
        self._trust = self._remembered_trust()
        oldest = self._state.version - self._strategy.max_staleness
        self._frame_digests = {frame.version: frame.digest for frame in self._ledger.frames_from(oldest)}
        self._buffer_since = self._clock() if self._state.buffer is not None else None
        if self._has_gone_back:
            with self._ledger.transaction():
                self._add_frame(over=self.is_over)
        if self._rules.merging.noise_multiplier is not None:
            log.warning("client-level differential privacy", warning=WARNING)
        self._reopen_if_goal_moved(facts)
        self._sweep(facts["ledger_id"])

    def _recover(self) -> None:
        rows = self._ledger.snapshots()
        try:
            self._held = recover_held(self._ledger, self._plan.manifest)
            recovered = recover(self._ledger, self._snapshots, self._plan.manifest)
        except DamagedError:
            if self._ledger.snapshots() == rows:
                raise
            log.info("a compaction took away what replay had begun with: once more, from what it left")
            self._recover()
            return
        self._state, self._seq = recovered.state, recovered.seq
        self._model_digest = fingerprint(self._state.model)
        self._snapshot_version, self._snapshot_seq = recovered.snapshot_version, recovered.snapshot_seq
        if recovered.merging != self._rules.merging:
            self._change_strategy(recovered.merging)

    def _remembered_trust(self) -> Trust | None:
        if self._rules.trust is None:
            return None
        trust = Trust(self._rules.trust, size=self._plan.manifest.size)
        lasting = self._ledger.entries_of("party") + self._ledger.entries_of("suspension")
        after = max(0, self._seq - REMEMBERED_ENTRIES)
        trust.remember(sorted((entry for entry in lasting if entry.seq <= after), key=lambda entry: entry.seq))
        recent = {entry.seq: entry for entry in lasting if entry.seq > after}
        trust.remember(recent.get(entry.seq, entry) for entry in self._ledger.entries_without_payloads(after=after))
        return trust

    def _sweep(self, ledger_id: str) -> None:
        """Snapshots that were written under earlier leaders and that the ledger does not name: nobody can name them any more."""
        known = {row.file for row in self._ledger.snapshots()}
        for file in self._snapshots.files(ledger_id):
            if file not in known and epoch_of(file) < self._ledger.epoch:
                log.info("a snapshot that the ledger does not name is removed", file=file)
                self._snapshots.remove(file)

    def is_leading(self) -> bool:
        """Whether nobody took the ledger's lead since `open`."""
        return self._ledger.is_leading()

    @property
    def ledger_id(self) -> str:
        return self._plan.ledger_id

    def lead(self) -> Lead | None:
        """Who took the ledger's lead last."""
        return self._ledger.lead()

    def other_leader(self) -> Lead | None:
        """Who leads this ledger, or was killed when it did."""
        lead = self._ledger.lead()
        return None if lead is None or lead.let_go or self._ledger.is_leading() else lead

    def parties(self) -> list[str]:
        """Those who ever sent an update."""
        return self._ledger.parties()

    def members(self) -> list[SignedMembership]:
        """What the ledger knows of parties, each with its newest revision."""
        newest = {entry.party: entry for entry in self._ledger.entries_of("party")}
        return [signed_membership_of(entry) for entry in newest.values()]

    def shut_out(self) -> dict[str, Suspension]:
        """The parties that this ledger suspended, and no operator took back as far as it knows."""
        return {} if self._trust is None else self._trust.shut_out()

    def close(self) -> None:
        # Never over the snapshot that the ledger names: its bytes would differ, and a crash in between would part the two.
        changed = self._state.version != self._snapshot_version or self._state.buffer is not None
        if changed and self._seq != self._snapshot_seq:
            self._snapshot()
        self._ledger.let_go()

    def _begin(self, initial: Vector) -> None:
        self._state = self._strategy.init(initial.copy())
        self._model_digest = fingerprint(self._state.model)
        self._seq = 0
        stored = self._write_snapshot(seq=1)
        with self._ledger.transaction():
            self._ledger.set_fact("federation", self._plan.federation)
            self._ledger.set_fact("manifest", self._plan.manifest.digest)
            self._ledger.set_fact("layout", self._plan.manifest.model_dump_json())
            self._pin_key()
            self._append_strategy()
            self._ledger.add_snapshot(SnapshotRow(self._seq, 0, stored.file, stored.sha256, self._clock()))
        self._snapshot_seq = self._seq

    def _pin_key(self) -> None:
        if self._rules.federation_key is not None:
            self._ledger.set_fact(FEDERATION_KEY, self._rules.federation_key)

    def _append_strategy(self) -> None:
        self._seq += 1
        settings = self._rules.merging.model_dump_json().encode()
        entry = Entry(self._seq, "merging", self._clock(), self._state.version, model_digest=self._model_digest, payload=settings)
        self._ledger.append([replace(entry, payload_digest=payload_digest(settings))])

    def _change_strategy(self, before: MergingSettings) -> None:
        """A buffer that the old strategy left is merged by it; then the new one goes on. Replay does the same."""
        log.info("merging settings changed", version=self._state.version, strategy=self._rules.merging.strategy)
        with self._ledger.transaction():
            if self._state.buffer is not None:
                self._append_flush(build_strategy(before, noise_key=self._ledger.noise_key()))
            self._append_strategy()
        self._state = replace(self._state, bases={})
        if self._held is not None and self._held.frame.version == self._state.version:
            self._state = remember_base(self._strategy, self._state, broadcast=self._held.model)
        self._snapshot()

    def _check_identity(self, facts: dict[str, str]) -> None:
        if "manifest" not in facts:
            return
        if facts["federation"] != self._plan.federation:
            raise ConfigurationError(
                f"{self._ledger.name} is the ledger of federation {facts['federation']!r}, not {self._plan.federation!r}: "
                "name another state folder"
            )
        pinned, own = facts.get(FEDERATION_KEY), self._rules.federation_key
        if pinned is not None and own is None:
            raise ConfigurationError(
                f"the updates in {self._ledger.name} are signed, and an unsigned one among them would look forged: leave "
                "[security] signatures = true, or name another state folder"
            )
        if pinned is not None and pinned != own:
            raise ConfigurationError(
                f"{self._ledger.name} belongs to the federation's key {str(pinned)[:12]}, not {str(own)[:12]}: its parties would "
                "follow nothing that this key signs; name the right file by [security] key"
            )
        if facts["manifest"] != self._plan.manifest.digest:
            raise ManifestMismatchError(
                f"{self._ledger.name} holds another model ({facts['manifest'][:12]}) than the task's "
                f"({self._plan.manifest.digest[:12]}): name the task and model it began with, or another state folder"
            )

    def _reopen_if_goal_moved(self, facts: dict[str, str]) -> None:
        moved = facts.get("over") != self._rules.goal.as_text()
        if self.is_over and moved and not self.goal_reached():
            log.info("the federation goes on", version=self._state.version)
            with self._ledger.transaction():
                self._add_frame(over=False)

    @property
    def version(self) -> int:
        return self._state.version

    @property
    def strategy(self) -> Strategy:
        return self._strategy

    @property
    def is_over(self) -> bool:
        frame = self._last_frame
        return frame is not None and frame.over

    @property
    def _last_frame(self) -> FrameRow | None:
        return None if self._held is None else self._held.frame

    def decide(self, arrivals: Sequence[Arrival]) -> list[Verdict]:
        """One transaction for all of them, and for the frame that is due afterwards.

        The list is shorter than the arrivals when the federation is over or reached its last version on the way: the rest is not
        decided.
        """
        verdicts: list[Verdict] = []
        entries: list[Entry] = []
        with self._ledger.transaction():
            keys = [(a.sender.party, a.sender.update_id) for a in arrivals if a.sender is not None]
            decided = self._ledger.decided(keys)
            for arrival in arrivals:
                if self.is_over or self.goal_reached():
                    break
                verdict, made = self._decide_one(arrival, decided)
                verdicts.append(verdict)
                entries.extend(made)
                decided.update({(entry.party or "", entry.update_id or ""): entry for entry in made if entry.kind == "update"})
            self._ledger.append(entries)
            self._frame_if_due()
            reach("aggregator.decided")
        reach("aggregator.committed")
        self._after_commit()
        return verdicts

    def tick(self) -> None:
        """What is due by the clock: a frame, a buffer that has waited long enough, parts that expired. Raises FencedError."""
        now = self._clock()
        self._look_whether_leading(now)
        if self._buffer_since is not None and has_passed(self._rules.merging.buffer_timeout_s, since=self._buffer_since, now=now):
            log.info("buffer merged before it was full", version=self._state.version + 1)
            with self._ledger.transaction():
                self._append_flush(self._strategy)
                self._frame_if_due()
        elif self._is_frame_due(now):
            with self._ledger.transaction():
                self._frame_if_due()
        if has_passed(_EXPIRE_EVERY_S, since=self._expired_at, now=now):
            self._expired_at = now
            self._expire_parts(now)
        self._after_commit()

    def _look_whether_leading(self, now: float) -> None:
        """Who has nothing to write would not notice otherwise, and a rollback waits for it."""
        if not has_passed(_LOOK_EVERY_S, since=self._looked_at, now=now):
            return
        self._looked_at = now
        self._ledger.expect_lead()

    def _expire_parts(self, now: float) -> None:
        with self._ledger.transaction():
            expired = self._ledger.expire_parts(before=now - self._rules.parts_expire_s, after=now + self._rules.parts_expire_s)
        if expired:
            log.warning("half-sent updates expired", updates=expired)

    def finish(self) -> None:
        """The federation is over: the model as it is becomes the last frame."""
        if self.is_over:
            return
        with self._ledger.transaction():
            if self._state.buffer is not None:
                self._append_flush(self._strategy)
            self._add_frame(over=True)
            self._ledger.set_fact("over", self._rules.goal.as_text())
        self._after_commit()

    def unpublished(self) -> FrameRow | None:
        """The oldest frame that waits to be published, with its bodies."""
        newest = self._last_frame
        # They go out in order: if the newest is out, none waits.
        return None if newest is None or newest.published_at is not None else self._ledger.oldest_unpublished()

    def published(self, number: int) -> None:
        now = self._clock()
        with self._ledger.transaction():
            self._ledger.mark_published(number, at=now)
        if self._held is not None and self._held.frame.number == number:
            self._held = replace(self._held, frame=replace(self._held.frame, published_at=now))

    def standing_alone(self) -> FrameRow | None:
        """The newest frame with its bodies, among them a keyframe, so that anyone can begin with it; made where it had none."""
        if self._held is None:
            return None
        frame = self._ledger.with_bodies(self._held.frame)
        if frame.keyframe is None:
            frame, self._held = exact_keyframe(self._plan, self._held, body=frame.body or b"")
            with self._ledger.transaction():
                codec, body = frame.keyframe_codec or "", frame.keyframe or b""
                self._ledger.add_keyframe(frame.number, codec=codec, body=body, plan=frame.plan)
        return frame

    def goal_reached(self, accuracy: float | None = None) -> bool:
        return self._rules.goal.is_reached(version=self._state.version, accuracy=accuracy)

    def model_digest(self) -> str:
        return digest(self._state.model)

    def _decide_one(self, arrival: Arrival, decided: _Decided) -> tuple[Verdict, list[Entry]]:
        """The entries that it makes: what is known of the party now, the decision, and the party's suspension, as far as there
        are any."""
        sender, content, size = arrival.sender, arrival.content, arrival.size
        party = arrival.party if sender is None else sender.party
        enrolled = self._enrolled(arrival.credentials.membership)
        if self._trust is not None and party is not None and (why := self._trust.suspended(party)) is not None:
            # One entry says that the party is shut out; one for each message would let it fill the disk.
            self.counts["dropped"] += 1
            return Verdict(refused=Refused("suspended", why), size=size, party=party), enrolled
        known = None if sender is None else decided.get((sender.party, sender.update_id))
        is_too_often = known is not None and isinstance(content, Refused) and content.reason == "rate"
        if sender is None or is_too_often:
            verdict, suspension = self._unanswered(arrival, party)
            return verdict, [*enrolled, *suspension]
        if known is not None:
            return self._duplicate(known, sender, size), enrolled
        if isinstance(content, PartBody):
            whole = self._spool.take(sender, content, now=self._clock())
            if whole is None:
                return Verdict(), enrolled
            size = content.place.size
            content = examine(whole, sender, self._rules.limits, arrival.credentials) if isinstance(whole, bytes) else whole
        content = self._unless_given_up(content, arrival.credentials)
        epsilon = None if self._privacy is None or content.update is None else self._privacy.add(content.update)
        verdict, entry = self._settle(sender, content, size)
        suspension = self._weigh(entry)
        return replace(verdict, epsilon=epsilon, suspends=bool(suspension)), [*enrolled, entry, *suspension]

    def _unless_given_up(self, content: Examined | Refused, credentials: Credentials) -> Examined | Refused:
        """Not by a key that its party gave up between the look at the message and its turn: the ledger has the newer one, and who
        verifies it takes that."""
        signed = credentials.membership
        if self._trust is None or signed is None or isinstance(content, Refused) or content.signature is None:
            return content
        newest = self._trust.member(signed.membership.party)
        if newest is None or newest.public_key == signed.membership.public_key:
            return content
        return Refused("signature", "is signed by a key that its party has given up", content.update)

    def _unanswered(self, arrival: Arrival, party: str | None) -> tuple[Verdict, list[Entry]]:
        """Of a message that makes no entry and gets no receipt: it says no id, or one that was decided already and comes too
        often. It counts for its party's score all the same, which may end in a suspension."""
        self.counts["refused"] += 1
        refused = arrival.content if isinstance(arrival.content, Refused) else None
        verdict = Verdict(refused=refused, size=arrival.size, party=None if arrival.sender is None else party)
        if self._trust is None or party is None or refused is None:
            return verdict, []
        self._trust.strike(party, refused.reason)
        suspension = self._suspension(party, f"the last message was refused: {refused.reason}, {refused.detail}")
        return replace(verdict, suspends=bool(suspension)), suspension

    def _enrolled(self, signed: SignedMembership | None) -> list[Entry]:
        """What the ledger did not know yet of a party."""
        if signed is None or self._trust is None:
            return []
        known = self._trust.member(signed.membership.party)
        if known is not None and known.revision >= signed.membership.revision:
            return []
        entry = party_entry(self._seq + 1, signed, at=self._clock(), version=self._state.version)
        self._trust.remember([entry])
        if self._rules.federation_key is None:
            # Nobody could check later whose word it was: who leads next asks the register again.
            return []
        self._seq += 1
        return [replace(entry, model_digest=self._model_digest)]

    def _weigh(self, entry: Entry) -> list[Entry]:
        """What a decision says of its party, and the suspension that it ends in."""
        if self._trust is None:
            return []
        self._trust.remember([entry])
        return self._suspension(entry.party or "", f"the last update was refused: {entry.reason}, {entry.detail}")

    def _suspension(self, party: str, why: str) -> list[Entry]:
        """Where its score is too low by now."""
        score = None if self._trust is None else self._trust.below_threshold(party)
        if self._trust is None or score is None:
            return []
        member = self._trust.member(party)
        detail = f"its score fell to {score:.2f}; {why}"
        self._seq += 1
        suspension = suspension_entry(
            self._seq,
            party,
            revision=0 if member is None else member.revision,
            detail=detail[:1000],
            at=self._clock(),
            version=self._state.version,
        )
        self._trust.remember([suspension])
        self.counts["suspended"] += 1
        log.error("party suspended", party=party, reason=detail)
        return [replace(suspension, model_digest=self._model_digest)]

    def _settle(self, sender: Sender, content: Examined | Refused, size: int) -> tuple[Verdict, Entry]:
        if isinstance(content, Refused):
            return self._refuse(sender, content, size)
        refused = admit(
            content,
            self._state,
            strategy=self._strategy,
            frame_digests=self._frame_digests,
            rolled_back=self._rolled_back,
        )
        if refused is None and self._privacy is not None:
            refused = self._privacy.overspent(content.update.party)
        if refused is not None:
            return self._refuse(sender, refused, size, content)
        judgement = Judgement() if self._trust is None else self._trust.judge(content, self._state.model)
        if isinstance(judgement, Refused):
            return self._refuse(sender, judgement, size, content)
        return self._merge(content, judgement, size)

    def _duplicate(self, known: Entry, sender: Sender, size: int) -> Verdict:
        """Decided before: the same receipt again, and nothing else. A sender in doubt sends again, so it is no fault."""
        self._spool.drop(sender)
        self.counts["duplicate"] += 1
        receipt = receipt_for(known, federation=self._plan.federation)
        refused = Refused(receipt.reason, receipt.detail) if receipt.outcome == "refused" and receipt.reason else None
        return Verdict(receipt, refused, is_duplicate=True, codec=known.codec or "", size=size)

    def _refuse(self, sender: Sender, refused: Refused, size: int, examined: Examined | None = None) -> tuple[Verdict, Entry]:
        self.counts["refused"] += 1
        self._seq += 1
        entry = refused_entry(
            self._seq, sender, refused, at=self._clock(), version=self._state.version, size=size, examined=examined
        )
        entry = replace(entry, model_digest=self._model_digest)
        receipt = receipt_for(entry, federation=self._plan.federation)
        return Verdict(receipt, refused, codec=entry.codec or "", size=size), entry

    def _merge(self, examined: Examined, judgement: Judgement, size: int) -> tuple[Verdict, Entry]:
        update, factor = examined.update, judgement.factor
        contribution = Contribution(update.party, examined.delta, update.base_version, update.num_samples, factor)
        self._state, outcome = self._strategy.apply(self._state, contribution)
        if outcome.kind == "merged":
            self._model_digest = fingerprint(self._state.model)
        if self._trust is not None:
            self._trust.merged(examined, judgement)
        now = self._clock()
        self._buffer_since = None if self._state.buffer is None else (self._buffer_since or now)
        self.counts[outcome.kind] += 1
        self._seq += 1
        entry = accepted_entry(self._seq, examined, judgement, outcome, at=now, version=self._state.version, size=size)
        entry = replace(entry, model_digest=self._model_digest)
        return Verdict(receipt_for(entry, federation=self._plan.federation), codec=update.codec, size=size), entry

    def _append_flush(self, strategy: Strategy) -> None:
        self._state = strategy.flush(self._state)
        self._buffer_since = None
        self._model_digest = fingerprint(self._state.model)
        self._seq += 1
        self._ledger.append([Entry(self._seq, "flush", self._clock(), self._state.version, model_digest=self._model_digest)])

    def _frame_if_due(self) -> None:
        if self._is_frame_due(self._clock()):
            self._add_frame(over=False)

    def _is_frame_due(self, now: float) -> bool:
        return not self.is_over and is_due(self._plan, self._last_frame, version=self._state.version, now=now)

    @property
    def _has_gone_back(self) -> bool:
        """Whether the receivers have to be told of a rollback."""
        last = self._last_frame
        return last is not None and any(last.version < gone.by for gone in self._rolled_back)

    def _add_frame(self, *, over: bool) -> None:
        version, anew = self._state.version, self._has_gone_back
        frame, self._held = make_frame(
            self._plan, self._held, self._state.model, version=version, over=over, at=self._clock(), is_anew=anew
        )
        self._ledger.add_frame(frame)
        oldest = version - self._strategy.max_staleness
        self._frame_digests = {v: known for v, known in self._frame_digests.items() if v >= oldest}
        self._frame_digests[version] = frame.digest
        self._state = remember_base(self._strategy, self._state, broadcast=self._held.model)

    def _after_commit(self) -> None:
        if self._state.version - self._snapshot_version >= self._rules.snapshot_every_versions:
            self._snapshot()

    def _snapshot(self) -> None:
        stored = self._write_snapshot(seq=self._seq)
        with self._ledger.transaction():
            self._ledger.add_snapshot(SnapshotRow(self._seq, self._state.version, stored.file, stored.sha256, self._clock()))
        self._snapshot_version, self._snapshot_seq = self._state.version, self._seq

    def _write_snapshot(self, *, seq: int) -> Stored:
        stored = self._snapshots.write(self._state, seq=seq, ledger=self._plan.ledger_id, epoch=self._ledger.epoch)
        reach("aggregator.snapshot")
        return stored
