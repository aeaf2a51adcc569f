"""A TCP proxy before one upstream, whose link becomes as bad as links get, and good again, while it runs.

Up is from the client to the upstream, as updates go; down is the other way.
"""

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

HOST = "127.0.0.1"
CHUNK_BYTES = 64 << 10
QUEUED_CHUNKS = 64
"""What one direction of a connection holds at most, 4 MiB: with a delay, no more than that passes in the time of the delay."""
PIECE_S = 0.02
"""A slow link passes so much at a time."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Of SO_LINGER: the other end gets an RST, and what the socket still had to send is thrown away."""

_Chunk = tuple[float, bytes | None]
"""When it came, by the loop's clock, and what: b"" is the end of the stream, None a reset."""


@dataclass(frozen=True, slots=True)
class Counters:
    """`connections` were accepted and not refused; bytes are those that were passed on, dropped ones come apart."""

    connections: int
    refused: int
    bytes_up: int
    bytes_down: int
    dropped_up: int
    dropped_down: int


class _BrokenError(Exception):
    """The connection cannot go on: one of its ends was reset, or bytes of it are lost."""


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of the link."""

    drops: bool = False
    passed_bytes: int = 0
    dropped_bytes: int = 0
    free_at_s: float = 0.0
    """When its pace lets the next bytes pass, by the loop's clock."""


@dataclass(slots=True, eq=False)
class _Connection:
    sockets: list[socket.socket]
    lost: set[_Way] = field(default_factory=set)
    """The directions in which bytes were dropped."""
    has_ended: bool = False
    """In good order: both ends closed their side, and the other end was told."""

    def close(self) -> None:
        for opened in self.sockets:
            if not self.has_ended:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            opened.close()


class Link:
    """Its conditions add up, and hold for all connections, present and to come, until `heal` or their own end."""

    def __init__(self, upstream: tuple[str, int], *, port: int) -> None:
        self.port = port
        self._upstream = upstream
        self._up, self._down = _Way(), _Way()
        self._tasks: dict[asyncio.Task[None], _Connection] = {}
        self._accepted = self._refused = 0
        self._refuses = self._is_black_hole = False
        self._bytes_per_s: float | None = None
        self._delay_s = 0.0
        self._change = asyncio.Event()

    @property
    def open_connections(self) -> int:
        return len(self._tasks)

    @property
    def counters(self) -> Counters:
        """As of now."""
        up, down = self._up, self._down
        return Counters(
            connections=self._accepted,
            refused=self._refused,
            bytes_up=up.passed_bytes,
            bytes_down=down.passed_bytes,
            dropped_up=up.dropped_bytes,
            dropped_down=down.dropped_bytes,
        )

    def cut(self) -> None:
        """Resets both ends of every present connection; what was under way is lost. New ones are accepted as before."""
        for task in self._tasks:
            task.cancel()

    def refuse(self, on: bool = True) -> None:
        """New connections are reset as soon as they are accepted; present ones live on."""
        self._refuses = on

    def black_hole(self, on: bool = True) -> None:
        """Nothing passes, ends of connections included, and nothing is lost: it all passes when this ends.

        What the kernel has already taken from us still arrives. New connections open, and reach the upstream afterwards.
        """
        self._is_black_hole = on
        self._wake()

    def deafen(self, on: bool = True) -> None:
        """What comes down is dropped, as confirms and deliveries. When this ends, connections that lost bytes are cut."""
        self._drop(self._down, on)

    def mute(self, on: bool = True) -> None:
        """What goes up is dropped, as publishes and acknowledgements. When this ends, connections that lost bytes are cut."""
        self._drop(self._up, on)

    def slow(self, bytes_per_s: float | None) -> None:
        """Each direction has this pace for itself, and all connections share it. None: as fast as it goes."""
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"a slow link still passes something, not {bytes_per_s:g} bytes/s: use black_hole")
        self._bytes_per_s = bytes_per_s
        self._up.free_at_s = self._down.free_at_s = 0.0
        self._wake()

    def delay(self, seconds: float) -> None:
        """Latency of each direction, for what is under way already too; the order stays."""
        self._delay_s = seconds
        self._wake()

    def heal(self) -> None:
        self.refuse(False)
        self.deafen(False)
        self.mute(False)
        self.slow(None)
        self.delay(0.0)
        self.black_hole(False)

    def _drop(self, way: _Way, on: bool) -> None:
        if way.drops and not on:
            for task, connection in self._tasks.items():
                if way in connection.lost:
                    task.cancel()
        way.drops = on

    def _wake(self) -> None:
        """Whoever waits for its turn looks again."""
        self._change.set()
        self._change = asyncio.Event()

    async def accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        """Never returns. The connections are tasks of the group."""
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            connection = _Connection([client])
            if self._refuses:
                self._refused += 1
                connection.close()
                continue
            self._accepted += 1
            task = group.create_task(self._serve(connection))
            self._tasks[task] = connection
            # Not by the task itself: one that is cancelled before its first step never runs.
            task.add_done_callback(lambda task: self._tasks.pop(task).close())

    async def _serve(self, connection: _Connection) -> None:
        try:
            await self._turn(self._up, asyncio.get_running_loop().time())
            (client,), upstream = connection.sockets, socket.socket()
            connection.sockets.append(upstream)
            upstream.setblocking(False)
            await asyncio.get_running_loop().sock_connect(upstream, self._upstream)
            async with asyncio.TaskGroup() as group:
                for source, sink, way in ((client, upstream, self._up), (upstream, client, self._down)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    chunks: asyncio.Queue[_Chunk] = asyncio.Queue(QUEUED_CHUNKS)
                    group.create_task(_read(source, chunks))
                    group.create_task(self._write(chunks, sink, way=way, connection=connection))
            connection.has_ended = True
        except* (_BrokenError, OSError):
            pass  # Both ends are told by an RST.

    async def _write(self, chunks: asyncio.Queue[_Chunk], sink: socket.socket, *, way: _Way, connection: _Connection) -> None:
        while True:
            came_s, chunk = await chunks.get()
            await self._turn(way, came_s)
            if chunk is None or (chunk == b"" and connection.lost):
                raise _BrokenError
            if chunk == b"":
                sink.shutdown(socket.SHUT_WR)
                return
            rest = memoryview(chunk)
            while rest:
                await self._turn(way, came_s)
                # Once it has lost bytes, none may follow them, not even in the moment before it is cut.
                if way.drops or way in connection.lost:
                    connection.lost.add(way)
                    way.dropped_bytes += len(rest)
                    break
                rest = rest[await self._send(rest, sink, way=way) :]

    async def _send(self, rest: memoryview, sink: socket.socket, *, way: _Way) -> int:
        """How many bytes; none after a wait for a full socket, in which all may have changed."""
        try:
            sent = sink.send(rest[: self._piece_bytes()])
        except BlockingIOError:
            await _until_writable(sink)
            return 0
        way.passed_bytes += sent
        if self._bytes_per_s is not None:
            # Timers fire late: a piece's time is made up for, but a pause is no credit.
            begins_s = max(way.free_at_s, asyncio.get_running_loop().time() - PIECE_S)
            way.free_at_s = begins_s + sent / self._bytes_per_s
        return sent

    async def _turn(self, way: _Way, came_s: float) -> None:
        """Waits until what came then may pass."""
        loop = asyncio.get_running_loop()
        while (left_s := self._due_s(way, came_s) - loop.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if left_s == math.inf else left_s):
                    await self._change.wait()

    def _due_s(self, way: _Way, came_s: float) -> float:
        return math.inf if self._is_black_hole else max(came_s + self._delay_s, way.free_at_s)

    def _piece_bytes(self) -> int:
        return CHUNK_BYTES if self._bytes_per_s is None else max(1, min(CHUNK_BYTES, int(PIECE_S * self._bytes_per_s)))


async def _read(source: socket.socket, chunks: asyncio.Queue[_Chunk]) -> None:
    """Until the stream ends. A full queue leaves the rest to the kernel, and so slows whoever sends."""
    loop = asyncio.get_running_loop()
    chunk: bytes | None = b""
    while True:
        try:
            chunk = await loop.sock_recv(source, CHUNK_BYTES)
        except OSError:
            chunk = None
        await chunks.put((loop.time(), chunk))
        if not chunk:
            return


async def _until_writable(sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(sink, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(sink)


@asynccontextmanager
async def proxy(upstream_host: str, upstream_port: int) -> AsyncIterator[Link]:
    """On a free port of this machine, which stays the same; at the end all connections are cut."""
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        link = Link((upstream_host, upstream_port), port=listener.getsockname()[1])
        # On a stack that is not told what the body raises, which the group would wrap.
        stack = AsyncExitStack()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        accepting = group.create_task(link.accept(listener, group))
        try:
            yield link
        finally:
            accepting.cancel()
            link.cut()
            await stack.aclose()
