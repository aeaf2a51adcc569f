"""What client-level differential privacy has cost each party, by the ledger."""

from aggregator.ledger import Ledger
from broker_fl.config import MergingSettings
from broker_fl.privacy.accounting import History, Steps, total

WARNING = (
    "client-level differential privacy hides a whole party among the others, by noise as large as one party's say: with fewer "
    "than some thousands of parties a model that still learns hides little. It protects against who reads the models, not "
    "against the aggregator"
)


def spent_as_clients(ledger: Ledger) -> dict[str, History | None]:
    """By party, each merged buffer that it had a part in: one Gaussian mechanism without sampling, since a party that comes when
    it likes is no random sample, and `fraction` is drawn by a hash that everybody knows.

    None for a party that had a part in a merge without noise, which hides nothing. Empty where no merge had noise.
    """
    spent: dict[str, History | None] = {}
    noise_by_seq = {
        entry.seq: MergingSettings.model_validate_json(entry.payload or b"").noise_multiplier
        for entry in ledger.entries_of("merging")
    }
    if not any(noise_by_seq.values()):
        return {}
    noise: float | None = None
    waiting: list[str] = []
    for entry in ledger.entries_without_payloads():
        if entry.kind == "update" and entry.outcome in ("merged", "buffered") and entry.party is not None:
            waiting.append(entry.party)
        if entry.kind == "flush" or entry.outcome == "merged":
            for party in waiting:
                spent[party] = _charged(spent.get(party, {}), noise)
        if entry.kind in ("flush", "rollback") or entry.outcome == "merged":
            waiting = []
        noise = noise_by_seq.get(entry.seq, noise)
    return spent


def _charged(before: History | None, noise: float | None) -> History | None:
    return None if before is None or noise is None else total(before, Steps(noise, 1.0, 1))
