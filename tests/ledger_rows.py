"""Rows for a ledger, with what a test does not care about filled in."""

import uuid
from contextlib import contextmanager
from dataclasses import replace

from aggregator.opening import open_ledger
from aggregator.records import Entry, FrameRow, PartRow
from broker_fl.signing import payload_digest


@contextmanager
def begun_ledger(url):
    """Open, and of a federation: its chain begins with that."""
    with open_ledger(url) as ledger:
        if "federation" not in ledger.facts():
            with ledger.transaction():
                ledger.set_fact("federation", "ward")
                ledger.set_fact("manifest", "e" * 64)
        yield ledger


def entry(seq, party="ann", update_id=None, **changes):
    facts = {
        "kind": "update",
        "at": 1.0,
        "version": seq,
        "party": party,
        "update_id": update_id or uuid.uuid4().hex,
        "size": 100,
        "outcome": "merged",
        "staleness": 1,
        "weight": 0.3,
        "model_digest": "f" * 64,
        "payload": b"content",
    }
    made = Entry(seq, **{**facts, **changes})
    return made if made.payload is None else replace(made, payload_digest=payload_digest(made.payload))


def frame(number, *, body=b"frame", version=None, **changes):
    facts = {
        "at": 1.0,
        "base": number - 1 or None,
        "digest": "d" * 64,
        "model_digest": "m" * 64,
        "codec": "int8",
        "rounding": None,
        "plan": "p" * 64,
        "over": False,
        "size": 5,
        "log_bytes": 5 * (number - 1),
    }
    return FrameRow(**{"number": number, "version": number if version is None else version, "body": body, **facts, **changes})


def with_keyframe(number, *, body=b"whole", **changes):
    return frame(number, keyframe_codec="float32", keyframe_size=len(body), keyframe=body, **changes)


def part(index, *, party="ann", update_id="u" * 32, at=1.0, body=b"abc", parts=3):
    return PartRow(party, update_id, index, parts, 9, "s" * 64, at, body)


def append(ledger, *entries):
    with ledger.transaction():
        ledger.append(entries)


def add_frames(ledger, *frames):
    with ledger.transaction():
        for added in frames:
            ledger.add_frame(added)


def publish(ledger, *numbers):
    with ledger.transaction():
        for number in numbers:
            ledger.mark_published(number, at=7.0)


READS = {
    "facts": lambda ledger: ledger.facts(),
    "lead": lambda ledger: ledger.lead(),
    "is_leading": lambda ledger: ledger.is_leading(),
    "last_seq": lambda ledger: ledger.last_seq(),
    "last_entry": lambda ledger: ledger.last_entry(),
    "chain_after": lambda ledger: ledger.chain_after(1),
    "chain_after the beginning": lambda ledger: ledger.chain_after(0),
    "decided": lambda ledger: ledger.decided([("ann", "a" * 32)]),
    "nothing decided": lambda ledger: ledger.decided([]),
    "entries_after": lambda ledger: list(ledger.entries_after(0)),
    "first of entries_after": lambda ledger: next(ledger.entries_after(0)),
    "entries_of": lambda ledger: ledger.entries_of("update"),
    "first_merged": lambda ledger: ledger.first_merged("ann"),
    "parties": lambda ledger: ledger.parties(),
    "payload_bytes": lambda ledger: ledger.payload_bytes(upto=2),
    "last_frame": lambda ledger: ledger.last_frame(),
    "frames_from": lambda ledger: ledger.frames_from(0),
    "oldest_unpublished": lambda ledger: ledger.oldest_unpublished(),
    "with_bodies": lambda ledger: ledger.with_bodies(frame(1)),
    "bodies_after": lambda ledger: list(ledger.bodies_after(0)),
    "first of bodies_after": lambda ledger: next(ledger.bodies_after(0)),
    "newest_keyframe": lambda ledger: ledger.newest_keyframe(),
    "starts": lambda ledger: ledger.starts(),
    "start": lambda ledger: ledger.start(1),
    "last_codecs": lambda ledger: ledger.last_codecs(),
    "snapshots": lambda ledger: ledger.snapshots(),
    "totals": lambda ledger: ledger.totals(),
    "frame_totals": lambda ledger: ledger.frame_totals(),
    "latest_version": lambda ledger: ledger.latest_version(),
}
