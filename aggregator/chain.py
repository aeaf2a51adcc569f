"""The hash chain over the ledger's entries: each binds the one before it. Pure.

    chain(0) = SHA-256(canonical(header))
    chain(n) = SHA-256(chain(n - 1) || canonical(entry n))        for seq n = 1, 2, ...

`canonical` is one JSON object without spaces, its keys in alphabetical order, fields that are not given left out, numbers as
Python writes them. An entry's facts name the digests (BLAKE3) of its payload and of the model after it, so that the chain holds
them too, and goes on holding them after the payloads are dropped. The lines of `broker-fl ledger export` are these objects with
`chain` put last: whoever has SHA-256 and a text editor can check them.
"""

import hashlib
import json
from dataclasses import asdict

from aggregator.records import FORMAT, Entry

_NOT_BOUND = ("payload", "chain")


def genesis(*, ledger: str, federation: str, manifest: str) -> str:
    """What the first entry goes on from: a chain belongs to one ledger, federation and model layout."""
    return hashlib.sha256(header(ledger=ledger, federation=federation, manifest=manifest).encode()).hexdigest()


def header(*, ledger: str, federation: str, manifest: str) -> str:
    return _json({"federation": federation, "format": FORMAT, "kind": "ledger", "ledger": ledger, "manifest": manifest})


def link(before: str, entry: Entry) -> str:
    """The entry's place in the chain, after the entry whose place is `before`."""
    return hashlib.sha256(bytes.fromhex(before) + canonical(entry).encode()).hexdigest()


def canonical(entry: Entry) -> str:
    facts = asdict(entry)
    return _json({name: value for name, value in facts.items() if name not in _NOT_BOUND and value is not None})


def line(entry: Entry) -> str:
    """As it is exported: `canonical` and the chain."""
    return f'{canonical(entry)[:-1]},"chain":"{entry.chain}"}}'


def _json(facts: dict[str, object]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
