"""Whoever has the key of the noise can take the noise off: it is in the ledger, and nowhere else."""

from base64 import b64encode
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from aggregator.export import lines
from aggregator.history import roll_back, without
from aggregator.verification import verify
from broker_fl.config import MergingSettings
from broker_fl.errors import DamagedError

NOISY = MergingSettings(strategy="fedbuff", buffer_size=2, clip_norm=1.0, noise_multiplier=0.5)


class Overheard:
    """A transport, and all that is published through it."""

    def __init__(self, transport, heard):
        self._transport = transport
        self._heard = heard

    def __getattr__(self, name):
        return getattr(self._transport, name)

    async def publish(self, message):
        said = (message.exchange, message.routing_key, message.message_id, sorted(message.headers.items()))
        self._heard.append(message.body + repr(said).encode())
        await self._transport.publish(message)


def _overheard(ward, heard):
    @asynccontextmanager
    async def connect(name):
        async with ward.broker.connect(name) as transport:
            yield Overheard(transport, heard)

    return connect


def _key(bench):
    with bench.ledger() as ledger:
        return ledger.noise_key()


def _tells(content, key):
    """Whether it holds the key, however it may be written."""
    content = content.encode() if isinstance(content, str) else content
    written = (key, key.hex().encode(), key.hex().upper().encode(), b64encode(key), repr(key)[2:-1].encode())
    return any(one in content for one in written)


async def _lived(ward, heard):
    """Merged, buffered, refused, sent again, gone back, stopped and started again."""
    bench = ward.bench
    for version in (0, 2):
        rules = {"merging": NOISY, "snapshot_every_versions": 1, "keyframe_every_frames": 2}
        async with ward.party("ann") as ann, ward.party("bob") as bob, ward.running(connect=_overheard(ward, heard), **rules):
            frame = (await ann.frames_until(lambda frame, wanted=version: frame.version == wanted))[-1]
            first = await ann.send(frame)
            await ann.send(frame, seed=1)
            await ann.send_again(first)
            await bob.send(frame)
            outcomes = [receipt.outcome for receipt in await ann.receipts(3)]
            assert sorted(outcomes) == ["buffered", "buffered", "refused"]
            assert (await bob.receipt()).outcome == "merged"
            await ann.frames_until(lambda frame, wanted=version + 1: frame.version == wanted)
        with bench.ledger() as ledger:
            roll_back(ledger, bench.snapshots(), to=0, holder="an operator", at=7.0)


async def test_nothing_that_is_sent_written_beside_the_ledger_or_logged_holds_the_key(ward):
    heard = []
    with capture_logs() as logs:
        await _lived(ward, heard)
        bench = ward.bench
        with bench.ledger() as ledger:
            verified = verify(ledger, bench.snapshots())
            left = without(ledger, bench.snapshots(), party="bob")
            facts = ledger.facts()
            exported = list(lines(ledger))
    key = _key(bench)
    assert verified.version == left.version == 4
    kinds = {
        kind for kind in ("frame", "receipt", "updates.decided", "frame.published") if any(kind.encode() in one for one in heard)
    }
    assert kinds == {"frame", "receipt", "updates.decided", "frame.published"}
    snapshots = [file.read_bytes() for file in (bench.folder / "snapshots").iterdir()]
    assert len(snapshots) >= 5
    shown = [*heard, *snapshots, *exported, *map(repr, logs), repr(facts), repr(verified), repr(bench.entries())]
    assert not any(_tells(one, key) for one in shown)
    # Where it is, it would have been found.
    assert any(_tells(file.read_bytes(), key) for file in bench.folder.glob("ledger.db*"))


def test_coordinator_and_its_strategy_do_not_show_the_key(bench):
    with bench.opened(merging=NOISY) as coordinator:
        shown = repr(vars(coordinator)) + repr(coordinator.strategy)
    assert "Noise(std=0.5)" in shown
    assert not _tells(shown, _key(bench))


def test_complaint_about_a_damaged_key_does_not_show_it(bench):
    with bench.opened(merging=NOISY):
        pass
    key = _key(bench)
    bench.execute(f"UPDATE meta SET value = '{key.hex()[:-2]}zz' WHERE key = 'noise_key'")
    with pytest.raises(DamagedError) as raised, bench.opened(merging=NOISY):
        pass
    assert not _tells(str(raised.value), key)
