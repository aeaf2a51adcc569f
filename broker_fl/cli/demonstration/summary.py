"""What a demo came to, from the ledger and the parties' own counters."""

from dataclasses import dataclass
from typing import TypedDict

from aggregator.opening import open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger
from broker_fl.cli.demonstration.figures import Figures
from broker_fl.cli.stores import ledger_url
from broker_fl.config import Settings
from broker_fl.privacy.accounting import epsilon_of
from workers.outbox import read_counters
from workers.spending import open_spending, spending_file

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Summary:
    """What `--json` writes. Bytes are of message bodies, counted by the parties: sent again counts again."""

    task: str
    broker: str
    parties: int
    parameters: int
    versions: int
    updates_merged: int
    updates_refused: int
    refused_for: dict[str, int]
    """Reasons of the refusals that the demo heard of."""
    duplicates: int
    accuracy: float | None
    bytes_up: int
    bytes_down: int
    bytes_up_dense_float32: int
    """What the same updates would have taken as dense float32."""
    bytes_down_dense_float32: int
    """What the same frames would have taken with the whole model in each."""
    max_staleness_seen: int
    seconds: float
    epsilon_spent: dict[str, float] | None
    """By party and its own record, at `delta`; None without differential privacy. Likewise the next two."""
    max_epsilon: float | None
    delta: float | None


def summarise(settings: Settings, figures: Figures, *, broker: str) -> Summary:
    with open_ledger_for_reading(ledger_url(settings)) as ledger:
        parameters = manifest_of_ledger(ledger).size
        versions = ledger.latest_version()
        totals = ledger.totals()
    accepted = [total for total in totals if total.outcome != "refused"]
    counters = [read_counters(settings.worker.state, party) for party in figures.parties]
    sent = sum(counter.get("updates_sent", 0) for counter in counters)
    # Who reads a keyframe reads its frame too.
    frames = sum(counter.get("frames_received", 0) - counter.get("keyframes_received", 0) for counter in counters)
    return Summary(
        task=settings.task.name,
        broker=broker,
        parties=len(figures.parties),
        parameters=parameters,
        versions=versions,
        updates_merged=sum(total.updates for total in accepted),
        updates_refused=sum(total.updates for total in totals if total.outcome == "refused"),
        refused_for=dict(figures.refused_for),
        duplicates=figures.duplicates,
        accuracy=figures.accuracy,
        bytes_up=sum(counter.get("bytes_up", 0) for counter in counters),
        bytes_down=sum(counter.get("bytes_down", 0) for counter in counters),
        bytes_up_dense_float32=sent * parameters * _FLOAT32_BYTES,
        bytes_down_dense_float32=frames * parameters * _FLOAT32_BYTES,
        max_staleness_seen=max((total.max_staleness for total in accepted), default=0),
        seconds=round(figures.seconds, 2),
        **_privacy(settings, figures),
    )


class _Privacy(TypedDict):
    epsilon_spent: dict[str, float] | None
    max_epsilon: float | None
    delta: float | None


def _privacy(settings: Settings, figures: Figures) -> _Privacy:
    own = settings.privacy
    if not own.is_asked_for:
        return _Privacy(epsilon_spent=None, max_epsilon=None, delta=None)
    spent = {party: _spent(settings, party) for party in figures.parties}
    return _Privacy(epsilon_spent=spent, max_epsilon=own.most_epsilon, delta=own.delta)


def _spent(settings: Settings, party: str) -> float:
    file = spending_file(settings.worker.state, party, settings.privacy.record)
    if not file.exists():
        return 0.0
    with open_spending(file) as spending:
        return epsilon_of(spending.history(), delta=settings.privacy.delta, accountant=settings.privacy.accountant)
