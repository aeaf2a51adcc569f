"""`/metrics` over HTTP, from threads of its own."""

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from socketserver import ThreadingTCPServer
from threading import BoundedSemaphore, Thread
from typing import Protocol, TypeVar

import structlog
from prometheus_client import CollectorRegistry, MetricsHandler, disable_created_metrics

from broker_fl.errors import ConfigurationError

PATH = "/metrics"

_READERS_AT_MOST = 8
_READER_PATIENCE_S = 10.0
_LOOK_FOR_END_S = 0.1

Request = socket.socket | tuple[bytes, socket.socket]

log = structlog.get_logger(__name__)


class Metrics(Protocol):
    """What a service counts, in a registry of its own."""

    registry: CollectorRegistry


Counted = TypeVar("Counted", bound=Metrics)


@asynccontextmanager
async def served(make: Callable[[], Counted], *, host: str, port: int | None) -> AsyncIterator[Counted | None]:
    """Makes metrics, and serves them while inside; None, and nothing is served, where there is no port. 0 is any free one.

    Raises ConfigurationError where the port is in use, or the host is no address of this machine.
    """
    if port is None:
        yield None
        return
    # When each series began would be a series of its own.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = make()
    with await asyncio.to_thread(_listening, host, port, metrics.registry) as server:
        thread = Thread(target=server.serve_forever, args=(_LOOK_FOR_END_S,), name="metrics", daemon=True)
        thread.start()
        log.info("metrics are served", url=server.url)
        try:
            yield metrics
        finally:
            await asyncio.to_thread(server.shutdown)
            thread.join()


def _listening(host: str, port: int, registry: CollectorRegistry) -> "_Server":
    try:
        return _Server(host, port, registry)
    except (OSError, UnicodeError) as exc:
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"[metrics]: port {port} of {host} is in use: name another one for this process by --metrics-port (0: any)"
            ) from exc
        raise ConfigurationError(
            f"[metrics]: nothing can listen at port {port} of {host} ({exc}): is that an address of this machine?"
        ) from exc


class _Handler(MetricsHandler):
    timeout = _READER_PATIENCE_S

    def do_GET(self) -> None:  # noqa: N802
        if self.path.partition("?")[0] == PATH:
            super().do_GET()
        else:
            self.send_error(404)


class _Server(ThreadingTCPServer):
    """A thread for each reader, and no more than a few readers at once: others are turned away."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._host = f"[{host}]" if family == socket.AF_INET6 else host
        self._places = BoundedSemaphore(_READERS_AT_MOST)
        super().__init__((str(address[0]), port), _Handler.factory(registry))

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.server_address[1]}{PATH}"

    def process_request(self, request: Request, client_address: object) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Request, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Request, client_address: object) -> None:  # noqa: ARG002
        """One who hangs up in the middle is no error of ours, and does not end the service."""
        error = sys.exception()
        if isinstance(error, OSError):
            log.info("a reader of the metrics is gone", reason=str(error))
        else:
            log.error("metrics could not be read", exc_info=error)
