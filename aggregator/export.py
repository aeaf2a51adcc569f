"""The ledger as lines of JSON, for whoever audits it without this program."""

from collections.abc import Iterator

from aggregator.chain import header, line
from aggregator.ledger import Ledger
from aggregator.recovery import checked_entries


def lines(ledger: Ledger) -> Iterator[str]:
    """First what it is of, then its entries in order, without payloads. Raises DamagedError at the first that is not as it
    was.
    """
    facts = ledger.facts()
    yield header(ledger=facts["ledger_id"], federation=facts["federation"], manifest=facts["manifest"])
    for entry in checked_entries(ledger, after=0):
        yield line(entry)
