"""A private RabbitMQ node that runs deploy/rabbitmq as it is, but for folders and ports."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deployment import DEPLOY

from broker_fl.config import BrokerSettings
from broker_fl.transports import local_rabbitmq

HOST = local_rabbitmq.HOST
IN_CONTAINER = "/etc/rabbitmq"


@dataclass(frozen=True, slots=True)
class DeployedNode:
    folder: Path
    secrets: Path
    amqp_port: int
    management_port: int
    prometheus_port: int
    is_4: bool
    _processes: local_rabbitmq._Processes

    async def start_again(self) -> None:
        await self._processes.stop()
        await self._processes.boot()

    def broker(self, user: str | None = None, **more: str) -> BrokerSettings:
        """Settings of one who shows the certificate of `user`."""
        own = {}
        if user is not None:
            own = {key: str(self.secrets / "authority" / f"{user}.{end}") for key, end in CERTIFICATE.items()}
        url = f"amqps://{HOST}:{self.amqp_port}/federation"
        return BrokerSettings(**{"url": url, "ca": str(self.secrets / "ca.pem"), **own, **more})

    def operator(self) -> BrokerSettings:
        password = (self.secrets / "operator.password").read_text()
        return self.broker(management_url=f"https://operator:{password}@{HOST}:{self.management_port}")


CERTIFICATE = {"certificate": "pem", "certificate_key": "key"}


@asynccontextmanager
async def deployed_node(secrets: Path) -> AsyncIterator[DeployedNode]:
    """`secrets` is what make_secrets.sh made; the node reads its revocations where they are."""
    programs = local_rabbitmq._installed()
    ports = local_rabbitmq._choose_ports(None, None)
    (prometheus_port,) = local_rabbitmq._free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="broker-fl-deployed-"))
    is_4 = _version(programs.server, folder / "home").startswith("4.")
    settings = local_rabbitmq._Settings(
        amqp_port=None,
        management_port=None,
        max_message_size_bytes=None,
        statistics_interval_ms=1000,
        boot_timeout_s=60.0,
        stop_timeout_s=20.0,
        keep=False,
        tls=None,
    )
    _write(folder, secrets, ports, prometheus_port=prometheus_port, is_4=is_4)
    processes = local_rabbitmq._Processes(programs, settings, ports, folder)
    try:
        await processes.boot()
        yield DeployedNode(folder, secrets, ports.amqp, ports.management, prometheus_port, is_4, processes)
    finally:
        processes.remove()


def _version(server: Path, home: Path) -> str:
    """Takes a second, and leaves a cookie."""
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    said = subprocess.run(
        [server.with_name("rabbitmqctl"), "version"], env=environment, capture_output=True, text=True, check=True
    )
    return said.stdout.strip()


def _write(folder: Path, secrets: Path, ports: local_rabbitmq._Ports, *, prometheus_port: int, is_4: bool) -> None:
    source = DEPLOY / "rabbitmq"
    files = ["rabbitmq.conf", *(["rabbitmq-4.conf"] if is_4 else [])]
    text = "".join((source / name).read_text() for name in files)
    for listener, port in {"management.ssl": ports.management, "prometheus.ssl": prometheus_port}.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{listener}.port")]
        text = text.replace(line, f"{listener}.port = {port}\n{listener}.ip = {HOST}")
    text = text.replace("listeners.ssl.default = 5671", f"listeners.ssl.1 = {HOST}:{ports.amqp}")
    (folder / "rabbitmq.conf").write_text(text.replace(IN_CONTAINER, str(folder)))
    (folder / "advanced.config").write_text((source / "advanced.config").read_text().replace(IN_CONTAINER, str(folder)))
    shutil.copy(source / "enabled_plugins", folder)
    (folder / "definitions").mkdir()
    shutil.copy(source / "definitions.json", folder / "definitions" / "10-federation.json")
    shutil.copy(secrets / "logins.json", folder / "definitions" / "20-logins.json")
    (folder / "tls").mkdir()
    for name in ("ca.pem", "server.pem", "server.key"):
        shutil.copy(secrets / name, folder / "tls")
    (folder / "tls" / "crl").symlink_to(secrets / "authority" / "crl")
