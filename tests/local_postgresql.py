"""A private PostgreSQL server as a child process, for the tests of what keeps its rows in one.

It listens on loopback only, lives in a temporary folder of its own, and goes when its `with` ends. Where the process that
started it is killed, the folder goes all the same, and the kernel stops the server (on Linux; elsewhere the server ends
by itself within a minute of losing its folder).
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import NullPool, create_engine

BIN_VARIABLE = "BROKER_FL_POSTGRESQL_BIN"
"""The environment variable that names the folder of `initdb` and `postgres` elsewhere."""

BIN_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)

HOST = "127.0.0.1"
USER = "broker_fl"

START_ATTEMPTS = 3
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02

SETTINGS = {
    "listen_addresses": HOST,
    "max_connections": "50",
    "shared_buffers": "16MB",
    # Files in the server's folder. Those in /dev/shm would outlive a server that is killed.
    "dynamic_shared_memory_type": "mmap",
}

BECOME = """
import ctypes, os, signal, sys
parent, user_id, group_id, *command = sys.argv[1:]
if int(user_id) != os.geteuid():
    os.setgroups([])
    os.setgid(int(group_id))
    os.setuid(int(user_id))
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""
"""Like DIE_WITH_PARENT of local_rabbitmq, with two differences. PostgreSQL refuses to run as root, and the kernel forgets
the signal when a process changes its user: the user comes first. And SIGTERM lets the clients finish; SIGQUIT does not."""

REMOVE_WHEN_WE_END = """
read -r _
tries=0
until rm -rf -- "$0" 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || exit 1
    sleep 0.1
done
"""
"""Its standard input ends with us. The server, still ending by then, may put files into a folder that is being removed."""


class _PortTakenError(RuntimeError):
    """Somebody was faster: worth another try with another port."""


@dataclass(frozen=True, slots=True)
class _Account:
    """Whose processes and files the server's are."""

    user_id: int
    group_id: int


@dataclass(slots=True, eq=False)
class LocalPostgreSQL:
    """A running server, and the password of its superuser `broker_fl`.

    Linux stops the server when the *thread* that started it ends: start it in one that lasts.
    """

    port: int
    folder: Path
    password: SecretStr
    _bin: Path = field(repr=False)
    _account: _Account = field(repr=False)
    _fsync: bool = field(repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{USER}:{self.password.get_secret_value()}@{HOST}:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """Of the postmaster. It changes with `start_again`."""
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new and empty database. It goes when the body ends, whoever still uses it."""
        name = f"test_{secrets.token_hex(4)}"
        self._administer(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self._administer(f"DROP DATABASE {name} WITH (FORCE)")

    def _administer(self, statement: str) -> None:
        # A test that kills the server may fail before it starts it again; the tests after it need not fail with it.
        if not self.runs:
            self.start_again()
        engine = create_engine(self.url(), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def kill(self) -> None:
        """`kill -9` of all its processes. What was committed stays in its folder."""
        if not self.runs:
            return
        # Each of them has a process group of its own. Stopped, the postmaster starts no more, and is still their parent.
        os.kill(self.pid, signal.SIGSTOP)
        children = _children(self.pid)
        for pid in (self.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        # While one of them still has the shared memory, the server does not start again.
        until(lambda: not running(*children), what="the killed server's processes are gone", timeout_s=STOP_TIMEOUT_S)

    def stop(self) -> None:
        """An orderly shutdown, which ends the sessions of its clients; where that takes too long, a kill."""
        self._end(signal.SIGINT)

    def start_again(self) -> None:
        """The same server: same folder, port, password and databases. Stops it first where it still runs."""
        self.stop()
        self._start()

    def _start(self) -> None:
        settings = {**SETTINGS, "unix_socket_directories": str(self.folder), "fsync": "on" if self._fsync else "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *options]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for us.
            self._process = subprocess.Popen(
                _bound_to_us(command, self._account),
                env=_environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(self._is_ready, what="PostgreSQL is ready", timeout_s=START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def _is_ready(self) -> bool:
        if not self.runs:
            said = " ".join(self.log.read_text(errors="replace").splitlines()[-8:])
            kind = _PortTakenError if "Address already in use" in said else RuntimeError
            raise kind(f"PostgreSQL ended with status {self._process.returncode} while it started: {said}")
        # Its own word, and not an answer on its port, which may be another server's.
        lines = self._lock_file()
        return lines[:1] == [str(self.pid)] and [line.strip() for line in lines[7:]] == ["ready"]

    def _end(self, how: signal.Signals) -> None:
        try:
            if self.runs:
                self._process.send_signal(how)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def _close(self) -> None:
        self._end(signal.SIGQUIT)
        # Only a server that was killed leaves this file, and with it a System V shared memory segment that no folder holds.
        for line in self._lock_file()[6:7]:
            _key, segment = line.split()
            subprocess.run(["ipcrm", "-m", segment], stderr=subprocess.DEVNULL, check=False)

    def _lock_file(self) -> list[str]:
        try:
            return (self.folder / "data/postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []


@contextmanager
def local_postgresql(*, fsync: bool = True) -> Iterator[LocalPostgreSQL]:
    """A server with an empty cluster (UTF-8, locale C) on a free port; ready to work when the body starts.

    `fsync`: without it commits are faster and still outlive a kill, but no power cut.
    """
    bin_folder = find_postgresql()
    if bin_folder is None:
        raise RuntimeError(
            "no PostgreSQL server was found: install it (apt install postgresql, or brew install postgresql@17), "
            f"or name the folder of initdb and postgres in {BIN_VARIABLE} (now {os.environ.get(BIN_VARIABLE, '')!r})"
        )
    with _temporary_folder() as folder:
        account, password = _account(), SecretStr(secrets.token_hex(16))
        os.chown(folder, account.user_id, account.group_id)
        _make_cluster(bin_folder, folder, account, password)
        server = LocalPostgreSQL(_free_port(), folder, password, bin_folder, account, fsync)
        try:
            _start_on_a_free_port(server)
            yield server
        finally:
            server._close()


def find_postgresql() -> Path | None:
    """The folder of the server's programs, of the newest version that is installed."""
    override = os.environ.get(BIN_VARIABLE)
    if override:
        return _with_programs([Path(override)])
    installed = [folder for place in BIN_PLACES for folder in sorted(Path("/").glob(place[1:]), key=_version, reverse=True)]
    return _with_programs([*installed, *map(Path, os.get_exec_path())])


def _version(folder: Path) -> int:
    digits = re.search(r"\d+", folder.parent.name)
    return int(digits[0]) if digits else 0


def _with_programs(folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if all(shutil.which(name, path=folder) for name in ("initdb", "postgres"))), None)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Gone when the body ends, and also when we are killed within it. Short, since the name of a socket is."""
    folder = Path(tempfile.mkdtemp(prefix="fl-pg-"))
    remover = subprocess.Popen(
        ["sh", "-c", REMOVE_WHEN_WE_END, str(folder)], cwd="/", stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield folder
    finally:
        remover.communicate()


def _account() -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    raise RuntimeError("PostgreSQL refuses to run as root, and there is no user postgres or nobody: run the tests as a user")


def _make_cluster(bin_folder: Path, folder: Path, account: _Account, password: SecretStr) -> None:
    password_file = folder / "password"
    password_file.write_text(password.get_secret_value())
    # Not flushed to the disk: after a power cut nobody uses this folder again.
    options = [f"--username={USER}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]
    command = [str(bin_folder / "initdb"), f"--pgdata={folder / 'data'}", f"--pwfile={password_file}", *options]
    made = subprocess.run(
        _bound_to_us(command, account),
        env=_environment(),
        # It asks for its working directory, and its user may not see ours.
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise RuntimeError(f"initdb ended with status {made.returncode}: {made.stderr.strip()}")
    password_file.unlink()


def _start_on_a_free_port(server: LocalPostgreSQL) -> None:
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            server._start()
        except _PortTakenError:
            if not attempts_left:
                raise
            server.port = _free_port()
        else:
            return


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as opened:
        return int(opened.getsockname()[1])


def _bound_to_us(command: Sequence[str], account: _Account) -> list[str]:
    ids = (os.getpid(), account.user_id, account.group_id)
    return [sys.executable, "-I", "-S", "-c", BECOME, *map(str, ids), *command]


def _environment() -> dict[str, str]:
    """Nothing of ours: PGDATA, PGPORT and their like would win over what we choose."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _children(pid: int) -> list[int]:
    processes = [line.split() for line in _ps("-A", "-o", "pid=,ppid=")]
    return [int(child) for child, parent in processes if int(parent) == pid]


def running(*pids: int) -> list[int]:
    """Those that run. A process that ended, and that nobody has waited for yet, runs no more."""
    processes = [line.split() for line in _ps("-A", "-o", "pid=,stat=")]
    return [int(pid) for pid, state in processes if int(pid) in pids and not state.startswith("Z")]


def _ps(*arguments: str) -> list[str]:
    return subprocess.run(["ps", *arguments], capture_output=True, text=True, check=False).stdout.splitlines()


def until(reached: Callable[[], bool], *, what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(POLL_S)
