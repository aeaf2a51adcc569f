"""A private RabbitMQ node as a child process: to try things out, to test, and for all that happens on one machine.

It listens on loopback only, lives in a temporary folder of its own, and goes when its `async with` ends. Where the
process that started it is killed, the kernel stops the broker and its epmd (on Linux); only the folder stays behind.

Nothing here belongs to an event loop: a node may be killed and started again from another loop than its first.
"""

import asyncio
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from broker_fl.errors import LocalBrokerError

SERVER_VARIABLE = "BROKER_FL_RABBITMQ_SERVER"
"""The environment variable that names a `rabbitmq-server` script elsewhere."""

SERVER_PLACES = (
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",
    "/usr/local/opt/rabbitmq/sbin/rabbitmq-server",
)
ERLANG_PLACES = ("/usr/lib/erlang", "/opt/homebrew/opt/erlang/lib/erlang", "/usr/local/opt/erlang/lib/erlang")
PROGRAM_FOLDERS = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin"
DEBIAN_WRAPPER_FOLDERS = frozenset({"/usr/sbin", "/sbin"})

HOST = "127.0.0.1"
USER = "admin.local"
"""No party can have this name: it has a dot."""

BOOT_ATTEMPTS = 3
POLL_S = 0.05
LOG_NAME = "node.log"
LOG_PREFIX = re.compile(r"^\d{4}-\S+ \S+ \[\w+\] <\S+> ?")

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run by a Python of its own, which then becomes the program: between fork and exec, a function of ours could wait
forever for a lock that another thread held at the fork. The signal comes when the *thread* that started us ends."""


class _PortTakenError(LocalBrokerError):
    """Somebody was faster: worth another try with other ports."""


@dataclass(frozen=True, slots=True)
class NodeTls:
    """What a node needs to speak TLS alone. Who logs in shows a certificate of `ca` that is not revoked; its common name is the
    user."""

    ca: Path
    certificate: Path
    key: Path
    revocations: Path
    """The folder of lists, as Certificates.revocations. The node reads it at every handshake."""


@dataclass(frozen=True, slots=True)
class _Settings:
    amqp_port: int | None
    management_port: int | None
    max_message_size_bytes: int | None
    statistics_interval_ms: int
    boot_timeout_s: float
    stop_timeout_s: float
    keep: bool
    tls: NodeTls | None


@dataclass(frozen=True, slots=True)
class _Programs:
    server: Path
    epmd: Path


@dataclass(frozen=True, slots=True)
class _Ports:
    amqp: int
    management: int
    distribution: int
    epmd: int


@dataclass(slots=True)
class _Processes:
    """The part of a node that changes: its processes come and go, its ports and its folder stay."""

    programs: _Programs
    settings: _Settings
    ports: _Ports
    folder: Path
    broker: subprocess.Popen[bytes] | None = None
    epmd: subprocess.Popen[bytes] | None = None
    notify: socket.socket | None = None

    async def boot(self) -> None:
        if self.epmd is None or self.epmd.poll() is not None:
            self.epmd = await self._start_epmd()
        self._close_notify()
        self.notify = _notify_socket(self.folder)
        interval_ms = self.settings.statistics_interval_ms
        environment = _broker_environment(self.folder, self.ports, statistics_interval_ms=interval_ms)
        self.broker = self._spawn([str(self.programs.server)], environment, log=self.folder / LOG_NAME)
        await _until_ready(self.broker, self.notify, folder=self.folder, timeout_s=self.settings.boot_timeout_s)

    async def _start_epmd(self) -> subprocess.Popen[bytes]:
        # An epmd that the node starts by itself always outlives the node; one that it finds, it uses.
        port = self.ports.epmd
        if _listens(port):
            raise _PortTakenError(f"epmd's port {port} is in use")
        arguments = [str(self.programs.epmd), "-port", str(port), "-address", HOST]
        epmd = self._spawn(arguments, _environment(self.folder), log=self.folder / "epmd.log")
        try:
            await _until_listening(epmd, port)
        except BaseException:
            _kill(epmd)
            raise
        return epmd

    def _spawn(self, arguments: Sequence[str], environment: Mapping[str, str], *, log: Path) -> subprocess.Popen[bytes]:
        # A file and no pipe: a kept node goes on writing after we are gone. A session of its own: Ctrl-C is for us.
        with log.open("ab") as output:
            return subprocess.Popen(
                arguments if self.settings.keep else _bound_to_us(arguments),
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def stop(self) -> None:
        """Cancelled, it becomes a hard stop: pressing Ctrl-C twice leaves nothing running either."""
        try:
            if self.broker is not None:
                self.broker.terminate()
                await _ended(self.broker, timeout_s=self.settings.stop_timeout_s)
        finally:
            self.kill()

    async def control(self, *arguments: str) -> str:
        interval_ms = self.settings.statistics_interval_ms
        environment = _broker_environment(self.folder, self.ports, statistics_interval_ms=interval_ms)
        process = await asyncio.create_subprocess_exec(
            *(str(self.programs.server.with_name("rabbitmqctl")), "--quiet", *arguments),
            env=environment,
            cwd=self.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        text = said.decode(errors="replace").strip()
        if process.returncode:
            raise LocalBrokerError(f"rabbitmqctl {arguments[0]} failed: {' '.join(text.split())[-500:]}")
        return text

    def kill(self) -> None:
        if self.broker is not None:
            _kill(self.broker)

    def remove(self) -> None:
        self.kill()
        if self.epmd is not None:
            _kill(self.epmd)
        self._close_notify()
        shutil.rmtree(self.folder, ignore_errors=True)

    def let_live(self) -> None:
        self._close_notify()
        for process in (self.broker, self.epmd):
            if process is not None and process.poll() is None:
                # A Popen that believes its process to have ended neither waits for it nor warns about it.
                process.returncode = 0

    def _close_notify(self) -> None:
        if self.notify is not None:
            self.notify.close()


@dataclass(frozen=True, slots=True)
class LocalRabbitMQ:
    """A running node, and the administrator's name and password."""

    amqp_port: int
    management_port: int
    folder: Path
    user: str
    password: SecretStr
    _processes: _Processes = field(repr=False, compare=False)

    @property
    def is_tls(self) -> bool:
        return self._processes.settings.tls is not None

    @property
    def url(self) -> str:
        """Of a node with TLS, without a login: that is by certificate."""
        if self.is_tls:
            return f"amqps://{HOST}:{self.amqp_port}/"
        return f"amqp://{self.user}:{self.password.get_secret_value()}@{HOST}:{self.amqp_port}/"

    @property
    def management_url(self) -> str:
        scheme = "https" if self.is_tls else "http"
        return f"{scheme}://{self.user}:{self.password.get_secret_value()}@{HOST}:{self.management_port}"

    @property
    def pid(self) -> int:
        """Of the Erlang VM. It changes with `start_again`."""
        return _pid(self._processes.broker)

    @property
    def epmd_pid(self) -> int:
        return _pid(self._processes.epmd)

    @property
    def log(self) -> Path:
        return self.folder / LOG_NAME

    def kill(self) -> None:
        """`kill -9`. What the node had promised to keep stays in its folder."""
        self._processes.kill()

    async def stop(self) -> None:
        """An orderly shutdown, as far as `stop_timeout_s` allows; then a kill."""
        await self._processes.stop()

    async def control(self, *arguments: str) -> str:
        """`rabbitmqctl` with these arguments, as `set_disk_free_limit 900GB` raises an alarm; gives what it says. It takes a
        second or two. Raises LocalBrokerError."""
        return await self._processes.control(*arguments)

    async def start_again(self) -> None:
        """The same node: same folder, ports, users and durable queues. Stops it first where it still runs."""
        await self._processes.stop()
        await self._processes.boot()


@asynccontextmanager
async def local_rabbitmq(
    *,
    amqp_port: int | None = None,
    management_port: int | None = None,
    max_message_size_bytes: int | None = None,
    statistics_interval_ms: int = 1000,
    boot_timeout_s: float = 60.0,
    stop_timeout_s: float = 20.0,
    keep: bool = False,
    tls: NodeTls | None = None,
) -> AsyncIterator[LocalRabbitMQ]:
    """A node with the management plugin, on free ports where none are given; ready to work when the body starts.

    `max_message_size_bytes`: None leaves RabbitMQ its own (128 MiB before 4.0, 16 MiB since).
    `stop_timeout_s`: what an orderly end may take before the kill; it takes 6 s with nothing in the node. With 0 it is
    killed, and only clients can tell, since its folder goes anyway.
    `keep`: the node, its epmd and its folder stay when the body ends, and outlive this process.
    `tls`: the two ports speak TLS, and AMQP logs in by certificate alone; the management API has its password still.
    """
    settings = _Settings(
        amqp_port=amqp_port,
        management_port=management_port,
        max_message_size_bytes=max_message_size_bytes,
        statistics_interval_ms=statistics_interval_ms,
        boot_timeout_s=boot_timeout_s,
        stop_timeout_s=stop_timeout_s,
        keep=keep,
        tls=tls,
    )
    password = SecretStr(secrets.token_hex(16))
    processes = await _boot(_installed(), settings, password)
    ports = processes.ports
    try:
        yield LocalRabbitMQ(ports.amqp, ports.management, processes.folder, USER, password, _processes=processes)
    finally:
        await _leave(processes)


async def _leave(processes: _Processes) -> None:
    if processes.settings.keep:
        processes.let_live()
        return
    try:
        await processes.stop()
    finally:
        processes.remove()


def find_rabbitmq() -> Path | None:
    """The server's script. Never Debian's /usr/sbin wrapper, which changes to the user rabbitmq and its folder."""
    override = os.environ.get(SERVER_VARIABLE)
    if override:
        return _program([override])
    path = [folder for folder in os.get_exec_path() if folder.rstrip("/") not in DEBIAN_WRAPPER_FOLDERS]
    return _program([*SERVER_PLACES, *(f"{folder}/rabbitmq-server" for folder in path)])


def _find_epmd(server: Path | None) -> Path | None:
    """The one beside the server, where that brings its own Erlang; else the machine's."""
    beside = [str(server.with_name("epmd"))] if server else []
    on_path = shutil.which("epmd", path=_search_path())
    erl = shutil.which("erl", path=_search_path())
    roots = [*([Path(erl).resolve().parent.parent] if erl else []), *map(Path, ERLANG_PLACES)]
    in_roots = [str(place) for root in roots for place in (root / "bin/epmd", *sorted(root.glob("erts-*/bin/epmd")))]
    return _program([*beside, *([on_path] if on_path else []), *in_roots])


def _program(places: Iterable[str]) -> Path | None:
    return next((Path(place) for place in places if Path(place).is_file() and os.access(place, os.X_OK)), None)


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:{PROGRAM_FOLDERS}"


def _installed() -> _Programs:
    server = find_rabbitmq()
    epmd = _find_epmd(server)
    if server is None:
        raise LocalBrokerError(
            "no rabbitmq-server was found: install it (apt install rabbitmq-server, or brew install rabbitmq), "
            f"or name the script in {SERVER_VARIABLE} (now {os.environ.get(SERVER_VARIABLE, '')!r})"
        )
    if epmd is None:
        raise LocalBrokerError("Erlang's epmd was not found: add the folder that holds erl and epmd to PATH")
    return _Programs(server, epmd)


async def _boot(programs: _Programs, settings: _Settings, password: SecretStr, *, attempts: int = BOOT_ATTEMPTS) -> _Processes:
    ports = _choose_ports(settings.amqp_port, settings.management_port)
    processes = _Processes(programs, settings, ports, Path(tempfile.mkdtemp(prefix="broker-fl-rabbitmq-")))
    try:
        _write_files(processes.folder, _configuration(ports, settings, password), settings.tls)
        await processes.boot()
    except BaseException as exc:
        processes.remove()
        if not isinstance(exc, _PortTakenError) or attempts == 1:
            raise
        return await _boot(programs, settings, password, attempts=attempts - 1)
    return processes


def _choose_ports(amqp: int | None, management: int | None) -> _Ports:
    for name, port in (("AMQP", amqp), ("management", management)):
        if port is not None:
            _check_free(name, port)
    chosen = _free_ports(4)
    return _Ports(amqp or chosen[0], management or chosen[1], chosen[2], chosen[3])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [int(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _check_free(name: str, port: int) -> None:
    try:
        socket.create_server((HOST, port)).close()
    except OSError as exc:
        raise LocalBrokerError(f"{name} port {port} cannot be used ({exc.strerror}): choose another one") from exc
    # macOS lets us bind beside somebody who listens on all addresses.
    if _listens(port):
        raise LocalBrokerError(f"{name} port {port} is in use: stop what listens there, or choose another one")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _configuration(ports: _Ports, settings: _Settings, password: SecretStr) -> str:
    lines = [
        *(_plain_listeners(ports) if settings.tls is None else _tls_listeners(ports, settings.tls)),
        "management.rates_mode = basic",
        f"collect_statistics_interval = {settings.statistics_interval_ms}",
        f"default_user = {USER}",
        f"default_pass = {password.get_secret_value()}",
        "default_user_tags.administrator = true",
        "vm_memory_high_watermark.absolute = 1GB",
        "disk_free_limit.absolute = 200MB",
        # Quorum queues keep what is in their log in memory, until it has this size (512 MiB by default).
        f"raft.wal_max_size_bytes = {64 << 20}",
        "log.console = true",
        "log.console.use_colors = off",
        "log.file = false",
    ]
    if settings.max_message_size_bytes is not None:
        lines.append(f"max_message_size = {settings.max_message_size_bytes}")
    return "".join(f"{line}\n" for line in lines)


def _plain_listeners(ports: _Ports) -> list[str]:
    return [
        f"listeners.tcp.1 = {HOST}:{ports.amqp}",
        f"management.tcp.ip = {HOST}",
        f"management.tcp.port = {ports.management}",
    ]


def _tls_listeners(ports: _Ports, tls: NodeTls) -> list[str]:
    return [
        "listeners.tcp = none",
        f"listeners.ssl.1 = {HOST}:{ports.amqp}",
        "auth_mechanisms.1 = EXTERNAL",
        "ssl_cert_login_from = common_name",
        f"management.ssl.ip = {HOST}",
        f"management.ssl.port = {ports.management}",
        f"management.ssl.cacertfile = {tls.ca}",
        f"management.ssl.certfile = {tls.certificate}",
        f"management.ssl.keyfile = {tls.key}",
    ]


def _advanced(tls: NodeTls) -> str:
    """rabbitmq.conf has no key for the folder of revoked certificates, and what it says of ssl_options is lost beside this."""
    ca, certificate, key, revocations = map(_erlang_string, (tls.ca, tls.certificate, tls.key, tls.revocations))
    return f"""\
[{{rabbit, [{{ssl_options, [
  {{cacertfile, {ca}}}, {{certfile, {certificate}}}, {{keyfile, {key}}},
  {{versions, ['tlsv1.3', 'tlsv1.2']}},
  {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}},
  {{crl_check, peer}}, {{crl_cache, {{ssl_crl_hash_dir, {{internal, [{{dir, {revocations}}}]}}}}}},
  %% A resumed session shows no certificate: one that was revoked meanwhile would still do.
  {{reuse_sessions, false}}
]}}]}}].
"""


def _erlang_string(path: Path) -> str:
    escaped = str(path.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_files(folder: Path, configuration: str, tls: NodeTls | None) -> None:
    plugins = ["rabbitmq_management", *([] if tls is None else ["rabbitmq_auth_mechanism_ssl"])]
    (folder / "rabbitmq.conf").write_text(configuration)
    (folder / "advanced.config").write_text("[].\n" if tls is None else _advanced(tls))
    (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
    # Without a HOME for the cookie the node crashes at boot.
    (folder / "home").mkdir()


def _environment(folder: Path) -> dict[str, str]:
    """Little of ours: RABBITMQ_NODE_PORT and its like, with or without the prefix, would win over the node's file."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TZ") if name in os.environ}
    return {**kept, "PATH": _search_path(), "HOME": str(folder / "home")}


def _broker_environment(folder: Path, ports: _Ports, *, statistics_interval_ms: int) -> dict[str, str]:
    return {
        **_environment(folder),
        # With it the script becomes the VM; without it, a killed script leaves its VM behind.
        "NOTIFY_SOCKET": str(folder / "notify.sock"),
        "ERL_EPMD_PORT": str(ports.epmd),
        "ERL_EPMD_ADDRESS": HOST,
        "ERL_CRASH_DUMP": str(folder / "erl_crash.dump"),
        "RABBITMQ_NODENAME": f"broker-fl-{ports.amqp}@localhost",
        "RABBITMQ_DIST_PORT": str(ports.distribution),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "rabbit.pid"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _vm_arguments(statistics_interval_ms),
    }


def _vm_arguments(statistics_interval_ms: int) -> str:
    schedulers = min(4, os.cpu_count() or 1)
    # Quorum queues and streams count by a clock of their own, of 5 s, which rabbitmq.conf cannot set on 3.10.
    clocks = (f"-rabbit {kind}_tick_interval {statistics_interval_ms}" for kind in ("quorum", "stream"))
    # Without the interface, the port for other nodes would listen on all addresses.
    interface = "-kernel inet_dist_use_interface {127,0,0,1}"
    return " ".join((f"+S {schedulers}:{schedulers} +sbwt none", interface, *clocks))


def _bound_to_us(arguments: Sequence[str]) -> Sequence[str]:
    if sys.platform != "linux":
        return arguments
    return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *arguments]


def _notify_socket(folder: Path) -> socket.socket:
    path = folder / "notify.sock"
    path.unlink(missing_ok=True)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        opened.bind(str(path))
    except OSError as exc:
        opened.close()
        raise LocalBrokerError(f"no socket at {path} ({exc}): set TMPDIR to a shorter path") from exc
    opened.setblocking(False)
    return opened


async def _until_listening(epmd: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 10
    while not _listens(port):
        if epmd.poll() is not None:
            raise _PortTakenError(f"epmd ended with status {epmd.returncode} and does not listen on port {port}")
        if time.monotonic() > deadline:
            raise LocalBrokerError(f"epmd does not listen on port {port} after 10 s")
        await asyncio.sleep(POLL_S)


async def _until_ready(broker: subprocess.Popen[bytes], notify: socket.socket, *, folder: Path, timeout_s: float) -> None:
    # Its own word, and not an answer on its port, which may be another broker's.
    deadline = time.monotonic() + timeout_s
    while b"READY=1" not in _received(notify):
        status = broker.poll()
        if status is not None:
            raise _boot_error(f"RabbitMQ ended with status {status} while it started", folder)
        if time.monotonic() > deadline:
            raise _boot_error(f"RabbitMQ was not ready after {timeout_s:g} s", folder)
        await asyncio.sleep(POLL_S)


def _received(notify: socket.socket) -> bytes:
    try:
        return notify.recv(4096)
    except BlockingIOError:
        return b""


def _boot_error(what: str, folder: Path) -> LocalBrokerError:
    output = (folder / LOG_NAME).read_text(errors="replace")
    # Erlang says no more than "nodistribution" where its port was taken meanwhile, or epmd did not answer in time.
    taken = any(sign in output for sign in ("eaddrinuse", "dist_port_already_used", "nodistribution"))
    kind = _PortTakenError if taken else LocalBrokerError
    return kind(f"{what}: {_why(output) or 'it said nothing'}")


def _why(output: str) -> str:
    """In one line: the report of a failed boot where there is one, else the last lines."""
    _, found, report = output.partition("BOOT FAILED")
    lines = [LOG_PREFIX.sub("", line) for line in (report if found else output).splitlines()]
    return _one_line(lines)[:500] if found else _one_line(lines[-8:])[-500:]


def _one_line(lines: Iterable[str]) -> str:
    return " ".join(" ".join(lines).replace("===========", "").split())


async def _ended(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    """Asks the process: the node's pid file vanishes early in its shutdown, while the ports are still taken."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return
        await asyncio.sleep(POLL_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pid(process: subprocess.Popen[bytes] | None) -> int:
    if process is None:
        raise LocalBrokerError("the node has not been started")
    return process.pid
