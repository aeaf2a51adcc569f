"""Whether a party may train once more, with which noise, and that it is written down: for the outbox's thread."""

import math
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

import structlog

from broker_fl.errors import PrivacyError
from broker_fl.privacy.accounting import epsilon_of
from broker_fl.privacy.policy import Limits, Mechanism, Spent, exhausted_by, mechanism_for
from broker_fl.privacy.record import Promise, Training
from schemas.frame import Plan, TrainingPlan
from schemas.privacy import PrivacyPlan
from workers.outbox import Outbox
from workers.spending import Spending

log = structlog.get_logger(__name__)

_OUTBOX_ID = "outbox_id"
_KNOWN = "privacy_record"


@dataclass(frozen=True, slots=True)
class PlainTraining:
    """Nobody asks for noise."""


@dataclass(frozen=True, slots=True)
class Declined:
    """No training now, and why."""

    reason: str


class PrivacyBudget:
    """One party's, of one data set. Its record is opened with the first plan that asks for noise, or with a limit of its own."""

    def __init__(
        self,
        outbox: Outbox,
        *,
        file: Path,
        limits: Limits,
        federation: str,
        party: str,
        num_examples: int,
        clock: Callable[[], float],
    ) -> None:
        self._outbox = outbox
        self._file = file
        self._limits = limits
        self._federation = federation
        self._party = party
        self._num_examples = num_examples
        self._clock = clock
        self._opened: Spending | None = None

    @property
    def is_needed(self) -> bool:
        """Whether this party asks for it whatever the federation says."""
        return self._limits.refuses_plain_training

    def open(self) -> None:
        """Raises DamagedError, StorageError, ConfigurationError."""
        self._spending()

    def mechanism_for(self, plan: Plan, training: TrainingPlan) -> Mechanism | PlainTraining | Declined:
        """For the next training by this plan. Raises what `open` does."""
        asked = plan.privacy
        if asked is None:
            if self._limits.refuses_plain_training:
                return Declined("the federation asks for no differential privacy, and [privacy] of this party does")
            if self._file.exists() or self._outbox.fact(_KNOWN) is not None:
                return Declined(
                    f"{self._file} says what was spent of these examples, and a training without noise would have no bound: "
                    "where that is meant, put the record away"
                )
            return PlainTraining()
        spending = self._spending()
        steps = training.steps or training.epochs * math.ceil(self._num_examples / training.batch_size)
        try:
            mechanism = mechanism_for(
                asked, self._limits, num_examples=self._num_examples, batch_size=training.batch_size, steps=steps
            )
            exhausted = exhausted_by(mechanism.cost, spent=self._spent(spending), plan=asked, limits=self._limits)
        except PrivacyError as exc:
            return Declined(str(exc))
        if exhausted is not None:
            return Declined(f"the privacy budget is spent: {exhausted}")
        with self._outbox.transaction():
            self._promise(spending, asked)
        return mechanism

    def record(self, mechanism: Mechanism, *, ledger: str, base_version: int, update_id: str | None) -> None:
        """In the transaction of the update; None where there is none, since training diverged."""
        spending, outbox = self._spending(), self._outbox_id()
        spending.add(
            Training(
                at=self._clock(),
                federation=self._federation,
                party=self._party,
                outbox=outbox,
                ledger=ledger,
                base_version=base_version,
                update_id=update_id,
                noise_multiplier=mechanism.noise_multiplier,
                sample_rate=mechanism.sample_rate,
                steps=mechanism.steps,
                max_grad_norm=mechanism.max_grad_norm,
                num_examples=self._num_examples,
            )
        )
        self._outbox.set_fact(_KNOWN, spending.mark(outbox=outbox))

    def passed(self, asked: PrivacyPlan) -> str | None:
        """After `record`, in the same transaction, which must not be committed where this says why: another worker on the same
        data was faster. Whoever else writes to the record waits for this transaction.
        """
        try:
            exhausted = exhausted_by(None, spent=self._spent(self._spending()), plan=asked, limits=self._limits)
        except PrivacyError as exc:
            return str(exc)
        return None if exhausted is None else str(exhausted)

    def epsilon(self) -> float | None:
        """What all trainings in the record cost together, at this party's delta, by RDP, which answers in milliseconds; None
        where it has no answer, or while the record is not open.
        """
        if self._opened is None:
            return None
        try:
            return epsilon_of(self._opened.history(), delta=self._limits.delta, accountant="rdp")
        except PrivacyError:
            return None

    def _spent(self, spending: Spending) -> Spent:
        return Spent(on_data=spending.history(), on_federation=spending.history(federation=self._federation))

    def _promise(self, spending: Spending, asked: PrivacyPlan) -> None:
        limits = dumps({name: value for name, value in asdict(self._limits).items() if value is not None})
        spending.promise(
            Promise(self._clock(), self._federation, self._party, limits=limits, plan=asked.model_dump_json(exclude_none=True))
        )

    def _spending(self) -> Spending:
        if self._opened is None:
            spending = self._outbox.attach(self._file)
            spending.expect_whole(self._outbox.fact(_KNOWN), outbox=self._outbox_id())
            log.info("privacy record", file=str(self._file), trainings=spending.count())
            self._opened = spending
        return self._opened

    def _outbox_id(self) -> str:
        known = self._outbox.fact(_OUTBOX_ID)
        if known is None:
            known = uuid.uuid4().hex
            with self._outbox.transaction():
                self._outbox.set_fact(_OUTBOX_ID, known)
        return known
