import asyncio
import socket
import struct
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
import uvloop

from benchmarks.chaos.proxy import HOST, Link, proxy

PATIENCE_S = 20.0
SILENCE_S = 0.1
"""What has not come after so long does not come."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class End:
    reader: StreamReader
    writer: StreamWriter

    def say(self, text: bytes) -> None:
        self.writer.write(text)

    def reset(self) -> None:
        """As the kernel does for a process that was killed while there was something to read."""
        opened = self.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def hears(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert await self.reader.readexactly(len(text)) == text

    async def hears_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await self.reader.read(1)

    async def hears_the_end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert await self.reader.read(1) == b""

    async def is_reset(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionResetError):
                await self.reader.readexactly(MIB)


class Upstream:
    """Listens, and meets the clients that come through a link."""

    def __init__(self) -> None:
        self.port = 0
        self._accepted: asyncio.Queue[End] = asyncio.Queue()
        self._ends: list[End] = []

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(lambda *pair: self._accepted.put_nowait(End(*pair)), HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def client(self, link: Link) -> End:
        client = End(*await asyncio.open_connection(HOST, link.port))
        self._ends.append(client)
        return client

    async def accepted(self) -> End:
        async with asyncio.timeout(PATIENCE_S):
            end = await self._accepted.get()
        self._ends.append(end)
        return end

    async def meet(self, link: Link) -> tuple[End, End]:
        return await self.client(link), await self.accepted()

    async def close(self) -> None:
        for end in self._ends:
            end.writer.close()
            with suppress(ConnectionError):
                await end.writer.wait_closed()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    opened = Upstream()
    server = await opened.listen()
    yield opened
    server.close()
    await opened.close()


@pytest.fixture
async def link(upstream: Upstream) -> AsyncIterator[Link]:
    async with proxy(HOST, upstream.port) as opened:
        yield opened


async def _ends_all(link: Link) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while link.open_connections:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_bytes_pass_both_ways_and_are_counted(upstream, link):
    client, server = await upstream.meet(link)
    client.say(b"publish")
    await server.hears(b"publish")
    server.say(b"confirmed")
    await client.hears(b"confirmed")
    counters = link.counters
    assert (counters.connections, counters.bytes_up, counters.bytes_down) == (1, 7, 9)
    assert counters.dropped_up == counters.dropped_down == counters.refused == 0


async def test_an_end_passes_and_the_other_direction_lives_on(upstream, link):
    client, server = await upstream.meet(link)
    client.say(b"last words")
    client.writer.write_eof()
    await server.hears(b"last words")
    await server.hears_the_end()
    server.say(b"answer")
    server.writer.close()
    await client.hears(b"answer")
    await client.hears_the_end()
    await _ends_all(link)


async def test_a_reset_passes(upstream, link):
    client, server = await upstream.meet(link)
    client.reset()
    await server.is_reset()
    await _ends_all(link)


async def test_cut_resets_both_ends_and_new_connections_are_accepted(upstream, link):
    ends = [end for _ in range(3) for end in await upstream.meet(link)]
    link.cut()
    for end in ends:
        await end.is_reset()
    client, server = await upstream.meet(link)
    client.say(b"again")
    await server.hears(b"again")
    assert link.open_connections == 1
    assert link.counters.connections == 4


async def test_refused_connections_are_reset_and_present_ones_live_on(upstream, link):
    client, server = await upstream.meet(link)
    link.refuse()
    await (await upstream.client(link)).is_reset()
    client.say(b"still here")
    await server.hears(b"still here")
    link.refuse(False)
    await upstream.meet(link)
    assert (link.counters.connections, link.counters.refused) == (2, 1)


async def test_without_an_upstream_clients_are_reset(upstream):
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    async with proxy(HOST, port) as link:
        await (await upstream.client(link)).is_reset()


async def test_a_black_hole_holds_and_passes_on(upstream, link):
    client, server = await upstream.meet(link)
    link.black_hole()
    client.say(b"up")
    server.say(b"down")
    client.writer.write_eof()
    await server.hears_nothing()
    await client.hears_nothing()
    newcomer = await upstream.client(link)
    newcomer.say(b"hello")
    await newcomer.hears_nothing()
    link.black_hole(False)
    await server.hears(b"up")
    await server.hears_the_end()
    await client.hears(b"down")
    await (await upstream.accepted()).hears(b"hello")
    assert link.counters.dropped_up == link.counters.dropped_down == 0


async def test_a_reset_shows_when_the_black_hole_has_ended(upstream, link):
    client, server = await upstream.meet(link)
    link.black_hole()
    client.reset()
    await server.hears_nothing()
    link.black_hole(False)
    await server.is_reset()


async def test_what_a_deaf_client_does_not_hear_is_counted_and_its_connection_cut_afterwards(upstream, link):
    client, server = await upstream.meet(link)
    link.deafen()
    server.say(b"confirmed")
    await client.hears_nothing()
    client.say(b"publish")
    await server.hears(b"publish")
    assert (link.counters.dropped_down, link.counters.bytes_down, link.counters.bytes_up) == (9, 0, 7)
    link.deafen(False)
    await client.is_reset()
    await server.is_reset()


async def test_what_a_mute_client_says_is_counted_and_its_connection_cut_afterwards(upstream, link):
    client, server = await upstream.meet(link)
    link.mute()
    client.say(b"acknowledged")
    await server.hears_nothing()
    server.say(b"delivery")
    await client.hears(b"delivery")
    assert (link.counters.dropped_up, link.counters.bytes_up, link.counters.bytes_down) == (12, 0, 8)
    link.mute(False)
    await client.is_reset()
    await server.is_reset()


async def test_only_connections_that_lost_bytes_are_cut(upstream, link):
    link.deafen()
    link.mute()
    (silent, silent_server), (talking, talking_server) = await upstream.meet(link), await upstream.meet(link)
    talking.say(b"lost")
    await talking_server.hears_nothing()
    link.deafen(False)  # It heard all that there was.
    await talking.hears_nothing()
    link.heal()
    await talking.is_reset()
    silent.say(b"well")
    await silent_server.hears(b"well")


async def test_after_lost_bytes_an_end_is_a_reset(upstream, link):
    client, server = await upstream.meet(link)
    link.deafen()
    server.say(b"lost")
    server.writer.close()
    await client.is_reset()


async def test_what_a_slow_reader_leaves_is_not_collected(upstream, link):
    client, server = await upstream.meet(link)
    said = 0
    with suppress(TimeoutError):
        while said < 256 * MIB:
            client.say(bytes(MIB))
            said += MIB
            async with asyncio.timeout(0.5):
                await client.writer.drain()
    assert said < 64 * MIB
    client.writer.write_eof()
    received = 0
    async with asyncio.timeout(PATIENCE_S):
        while chunk := await server.reader.read(MIB):
            received += len(chunk)
    assert received == said == link.counters.bytes_up


async def test_a_slow_link_paces_each_direction_by_itself(upstream, link):
    client, server = await upstream.meet(link)
    loop = asyncio.get_running_loop()
    link.slow(200_000)
    began_s = loop.time()
    client.say(bytes(100_000))
    server.say(bytes(100_000))
    await server.hears(bytes(100_000))
    await client.hears(bytes(100_000))
    assert 0.4 < loop.time() - began_s < PATIENCE_S


async def test_a_link_that_is_no_longer_slow_lets_the_rest_pass(upstream, link):
    client, server = await upstream.meet(link)
    link.slow(10)
    client.say(bytes(MIB))
    await server.hears(bytes(1))
    link.slow(None)
    await server.hears(bytes(MIB - 1))


async def test_a_link_cannot_be_slower_than_slow(link):
    with pytest.raises(ValueError, match="black_hole"):
        link.slow(0)


async def test_a_delay_is_latency_and_keeps_the_order(upstream, link):
    client, server = await upstream.meet(link)
    loop = asyncio.get_running_loop()
    link.delay(0.3)
    began_s = loop.time()
    for part in (b"one ", b"after ", b"the other"):
        client.say(part)
        await asyncio.sleep(0.1)
    await server.hears(b"one after the other")
    # Each waits for itself: three delays in a row would be 0.9 s.
    assert 0.45 < loop.time() - began_s < PATIENCE_S


async def test_healed_all_that_was_held_passes(upstream, link):
    client, server = await upstream.meet(link)
    link.black_hole()
    link.delay(3600)
    link.slow(1)
    link.refuse()
    client.say(b"at last")
    await server.hears_nothing()
    link.heal()
    await server.hears(b"at last")
    newcomer, server = await upstream.meet(link)
    newcomer.say(b"me too")
    await server.hears(b"me too")


async def test_its_end_resets_all_connections_and_leaves_no_task(upstream):
    before = asyncio.all_tasks()
    async with proxy(HOST, upstream.port) as link:
        client, server = await upstream.meet(link)
        link.black_hole()
        held = await upstream.client(link)
        client.say(bytes(MIB))
    for end in (client, server, held):
        await end.is_reset()
    assert asyncio.all_tasks() == before
    assert link.open_connections == 0
    with pytest.raises(ConnectionRefusedError):
        await upstream.client(link)


async def test_what_the_body_raises_comes_out_as_it_was(upstream):
    async def body() -> None:
        async with proxy(HOST, upstream.port) as link:
            await upstream.meet(link)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()


def test_it_does_its_work_on_uvloop_too():
    async def check() -> None:
        upstream = Upstream()
        server = await upstream.listen()
        async with proxy(HOST, upstream.port) as link:
            client, far = await upstream.meet(link)
            client.say(bytes(16 * MIB))
            await far.hears(bytes(16 * MIB))
            link.deafen()
            far.say(b"lost")
            await client.hears_nothing()
            link.heal()
            await client.is_reset()
            await upstream.meet(link)
        server.close()
        await upstream.close()

    uvloop.run(check())
