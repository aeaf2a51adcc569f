import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from enrolled_parties import key_of

from broker_fl.errors import ConfigurationError
from broker_fl.keys import key_of as key_of_text
from broker_fl.keys import load_key, load_or_make_key

SECRET = key_of("ann").text()


def _mode(file):
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_key_that_is_made_is_its_owners_alone(tmp_path, umask):
    file = tmp_path / "state" / "federation.key"
    before = os.umask(umask)
    try:
        key = load_or_make_key(file)
    finally:
        os.umask(before)
    assert _mode(file) == 0o600
    assert file.read_text() == f"{key.text()}\n"
    assert list(file.parent.iterdir()) == [file]


def test_key_that_is_there_is_taken_and_left_as_it_is(tmp_path):
    file = tmp_path / "federation.key"
    file.write_text(f"  {SECRET}\n\n")
    assert load_or_make_key(file).public == key_of("ann").public
    assert load_key(file).public == key_of("ann").public
    assert file.read_text() == f"  {SECRET}\n\n"


def test_makers_at_once_all_get_the_one_key(tmp_path):
    """Threads of one process, which share its id; nobody sees half a file."""
    makers, folder = 16, tmp_path / "state"
    gate = threading.Barrier(makers)

    def make(_):
        gate.wait()
        return load_or_make_key(folder / "federation.key").public

    with ThreadPoolExecutor(makers) as threads:
        made = set(threads.map(make, range(makers)))
    assert made == {load_key(folder / "federation.key").public}
    assert [file.name for file in folder.iterdir()] == ["federation.key"]


def test_what_a_killed_maker_left_behind_is_in_nobodys_way(tmp_path, monkeypatch):
    """In a container every process has the same id."""
    file = tmp_path / "federation.key"

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", dies)
        patch.setattr(type(file), "unlink", lambda _: None)
        with pytest.raises(Killed):
            load_or_make_key(file)
    (left,) = tmp_path.iterdir()
    assert _mode(left) == 0o600
    key = load_or_make_key(file)
    assert load_key(file).public == key.public
    assert left.read_text() != file.read_text()


def test_missing_key_is_named_and_not_made_where_only_one_that_is_there_would_do(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is no .*federation\.key: name the federation's key by \[security\] key"):
        load_key(tmp_path / "federation.key")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", SECRET[:-1].encode(), SECRET.encode() + b"00", SECRET[:32].encode(), b"x" + SECRET[1:].encode(),
     bytes.fromhex(SECRET), b"\xff\xfe" + SECRET.encode(), SECRET.encode("utf-16"), f"-----BEGIN {SECRET}".encode()],
    ids=["empty", "blank", "short", "long", "half", "no digit", "raw", "marked", "wide", "PEM"],
)  # fmt: skip
def test_damaged_key_is_named_and_never_shown(tmp_path, content):
    file = tmp_path / "federation.key"
    file.write_bytes(content)
    for load in (load_key, load_or_make_key):
        with pytest.raises(ConfigurationError) as caught:
            load(file)
        assert str(caught.value) == f"{file} holds no private key: expected 64 hexadecimal digits"
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert file.read_bytes() == content


def test_text_of_a_setting_that_is_no_key_is_not_shown():
    with pytest.raises(ConfigurationError) as caught:
        key_of_text(SECRET[:-2], what="[security] party_key")
    assert str(caught.value) == "[security] party_key holds no private key: expected 64 hexadecimal digits"
    assert key_of_text(SECRET, what="it").text() == SECRET


def test_key_that_cannot_be_read_or_written_is_said_so(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match=r"folder cannot be read: .*Is a directory"):
        load_or_make_key(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"the federation's key .*file/federation\.key cannot be"):
        load_or_make_key(tmp_path / "file" / "federation.key")


def test_key_that_cannot_be_linked_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuses(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*no links here"):
        load_or_make_key(tmp_path / "federation.key")
    assert not list(tmp_path.iterdir())
