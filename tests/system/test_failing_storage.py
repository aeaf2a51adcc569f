"""Disks that are full, files that are damaged or missing, folders that are another's: nothing is made worse."""

import hashlib
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Running
from small_federation import SmallFederation

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

SMALL_KB, LARGE_KB = 3000, 200_000


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A file system of 3 MB; where none may be mounted, files of at most 3 MB for whoever is started with `wrapper`."""

    folder: Path
    is_mounted: bool

    @property
    def wrapper(self) -> tuple[str, ...]:
        return () if self.is_mounted else ("sh", "-c", f'ulimit -f {SMALL_KB * 2}; exec "$@"', "sh")

    def make_room(self) -> None:
        if self.is_mounted:
            subprocess.run(["mount", "-o", f"remount,size={LARGE_KB}k", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_KB}k", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield SmallDisk(folder, is_mounted)
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_full_disk_of_the_ledger_ends_the_aggregator_and_room_lets_it_go_on(
    small_disk: SmallDisk, federation: SmallFederation
) -> None:
    # Enrolment makes the federation's key, where the disk will be.
    federation.configure(security={"key": "federation.key"})
    await federation.enrol("a")
    worker = federation.worker("a")
    federation.ledger_file.parent.symlink_to(small_disk.folder)
    aggregator = federation.aggregator("--versions", "60", wrapper=small_disk.wrapper)
    line = await aggregator.ends_with_one_line()
    assert "broker-fl-state/ledger.db" in line
    if small_disk.is_mounted:
        assert "no space left for" in line
    reached = federation.version
    assert reached < 60
    small_disk.make_room()
    aggregator = federation.aggregator("--versions", "60")
    await aggregator.ends_well()
    await worker.ends_well()
    assert [entry.sequence for entry in federation.updates("a")] == list(range(1, 61))
    federation.expect_exactly_once("a")


async def test_full_disk_of_the_outbox_ends_the_worker_and_room_lets_it_go_on(
    small_disk: SmallDisk, federation: SmallFederation
) -> None:
    await federation.enrol("a")
    federation.home("a").joinpath("broker-fl-state").symlink_to(small_disk.folder)
    aggregator = federation.aggregator("--versions", "60")
    line = await federation.worker("a", wrapper=small_disk.wrapper).ends_with_one_line()
    assert "outbox-a.db" in line
    if small_disk.is_mounted:
        assert "no space left for" in line
    assert aggregator.is_alive
    small_disk.make_room()
    worker = federation.worker("a")
    await aggregator.ends_well()
    await worker.ends_well()
    assert [entry.sequence for entry in federation.updates("a")] == list(range(1, 61))
    federation.expect_exactly_once("a")


async def test_state_that_is_damaged_or_not_its_own_is_refused_by_name_and_left_as_it_is(
    federation: SmallFederation, played: Path
) -> None:
    await federation.enrol("party-1")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(played / "demo", federation.folder / name))

    def started(state: Path, *arguments: str) -> Running:
        return federation.aggregator("--set", "federation.name=demo", "--state", str(state), "--versions", "60", *arguments)

    torn, unread, flipped, lost, whole = (copy(name) / "aggregator" for name in ("torn", "unread", "flipped", "lost", "whole"))
    overwrite_middle(torn / "ledger.db")
    rewrite_a_payload(unread / "ledger.db")
    *_, newest = snapshots = sorted((flipped / "snapshots").iterdir())
    for snapshot in snapshots:
        overwrite_middle(snapshot)
        (lost / "snapshots" / snapshot.name).unlink()
    file = federation.folder / "file"
    file.touch()
    before = {state: contents(state) for state in (torn, unread, flipped, lost, whole)}
    expected = {
        started(torn): (f"{torn}/ledger.db", "is damaged"),
        started(flipped): (newest.name, "is damaged"),
        started(lost): (newest.name, "is missing"),
        started(whole, "--set", "federation.name=other"): (f"{whole}/ledger.db", "is the ledger of federation 'demo'"),
        started(file): (f"{file}", "cannot be used"),
        federation.run("ledger", "verify", "--state", str(unread)): (f"{unread}/ledger.db", "the payload of entry 7 differs"),
        federation.worker("party-1", "--state", str(whole.parent / "workers")): (
            "outbox-party-1.db",
            "belongs to federation 'demo'",
        ),
    }
    for running, texts in expected.items():
        line = await running.ends_with_one_line()
        assert all(text in line for text in texts)
    assert {state: contents(state) for state in before} == before


def overwrite_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = b"\xa5" * third
    file.write_bytes(data)


def rewrite_a_payload(ledger: Path) -> None:
    """As a failing disk might, where SQLite does not look."""
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE entries SET payload = CAST(substr(payload, 2) || x'ff' AS BLOB) WHERE seq = 7")


def contents(state: Path) -> dict[str, str]:
    """Digests of the snapshots, and of what the ledger holds but for who led it last."""
    names = [file for file in state.rglob("*") if file.suffix in {".db", ".safetensors"}]
    return {str(file.relative_to(state)): hashlib.sha256(content(file)).hexdigest() for file in names}


def content(file: Path) -> bytes:
    if file.suffix != ".db":
        return file.read_bytes()
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return "\n".join(line for line in connection.iterdump() if not line.startswith('INSERT INTO "lead"')).encode()
    except sqlite3.DatabaseError:
        return file.read_bytes()
