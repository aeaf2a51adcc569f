"""AMQP 0-9-1 without manners: frames as they are written, and as they come. Clients that behave cannot attack."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote, urlsplit

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

METHOD, HEADER, BODY, END = 1, 2, 3, b"\xce"
FRAME_BYTES = 131_072
"""That RabbitMQ takes, the 8 around its payload included."""
BODY_BYTES = FRAME_BYTES - 8
ANSWER_S = 20.0

NAMES = {
    311: "CONTENT_TOO_LARGE",
    312: "NO_ROUTE",
    403: "ACCESS_REFUSED",
    404: "NOT_FOUND",
    405: "RESOURCE_LOCKED",
    406: "PRECONDITION_FAILED",
    501: "FRAME_ERROR",
    502: "SYNTAX_ERROR",
    505: "UNEXPECTED_FRAME",
    530: "NOT_ALLOWED",
    540: "NOT_IMPLEMENTED",
    541: "INTERNAL_ERROR",
}


class ClosedError(Exception):
    """By the broker. Its text is the code and its name."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {NAMES.get(code, text.partition(' ')[0])}" if code else text)
        self.code = code
        self.text = text


def framed(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + END


def publishing(
    exchange: str,
    body: bytes,
    properties: commands.Basic.Properties | bytes,
    *,
    routing_key: str | bytes = b"",
    mandatory: bool = True,
    channel: int = 1,
) -> bytes:
    """The frames of one message. As bytes, properties are what follows the size in the frame of a header: flags and values."""
    key = routing_key.encode() if isinstance(routing_key, str) else routing_key
    method = struct.pack(">IH", commands.Basic.Publish.index, 0) + _short(exchange.encode()) + _short(key) + bytes([mandatory])
    raw = properties if isinstance(properties, bytes) else properties.marshal()
    chunks = [body[start : start + BODY_BYTES] for start in range(0, len(body), BODY_BYTES)]
    return b"".join(
        [
            framed(METHOD, channel, method),
            framed(HEADER, channel, struct.pack(">HHQ", commands.Basic.frame_id, 0, len(body)) + raw),
            *(framed(BODY, channel, chunk) for chunk in chunks),
        ]
    )


def _short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


class RawConnection:
    """One connection with channel 1 open. Whatever the broker closes raises ClosedError where something was waited for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._confirmed = 0
        self.published = 0

    async def login(self, user: str, password: str, vhost: str) -> None:
        self._writer.write(b"AMQP\x00\x00\x09\x01")
        await self.expect(commands.Connection.Start)
        self.send(commands.Connection.StartOk({}, "PLAIN", f"\0{user}\0{password}", "en_US"), channel=0)
        tune = await self.expect(commands.Connection.Tune)
        self.send(commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0), channel=0)
        self.send(commands.Connection.Open(vhost), channel=0)
        await self.expect(commands.Connection.OpenOk)

    async def open_channel(self, number: int = 1) -> None:
        self.send(commands.Channel.Open(), channel=number)
        await self.expect(commands.Channel.OpenOk)

    async def confirms(self) -> None:
        self.send(commands.Confirm.Select())
        await self.expect(commands.Confirm.SelectOk)

    def send(self, method: Frame, *, channel: int = 1) -> None:
        self._writer.write(frame.marshal(method, channel))

    async def write(self, data: bytes) -> None:
        """As fast as the broker takes it. Raises ClosedError."""
        if self._writer.is_closing():
            raise ClosedError(0, "connection lost")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError as exc:
            raise await self._why(exc) from exc

    async def _why(self, exc: ConnectionError) -> ClosedError:
        """What the broker said before it hung up."""
        with suppress(TimeoutError, ConnectionError):
            while True:
                await self.receive(within_s=0.5)
        return ClosedError(0, f"connection lost: {type(exc).__name__}")

    async def receive(self, *, within_s: float = ANSWER_S) -> object:
        """The next frame but heartbeats. Raises ClosedError, TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    head = await self._reader.readexactly(7)
                    kind, channel, size = struct.unpack(">BHI", head)
                    rest = await self._reader.readexactly(size + 1)
                except (asyncio.IncompleteReadError, ConnectionError) as exc:
                    raise ClosedError(0, "connection lost") from exc
                if kind in (METHOD, HEADER, BODY):
                    return self._heard(frame.unmarshal(head + rest)[2], channel)

    def _heard(self, value: object, channel: int) -> object:
        match value:
            case commands.Channel.Close(reply_code=code, reply_text=text):
                self.send(commands.Channel.CloseOk(), channel=channel)
                raise ClosedError(int(code or 0), str(text))
            case commands.Connection.Close(reply_code=code, reply_text=text):
                self.send(commands.Connection.CloseOk(), channel=0)
                raise ClosedError(int(code or 0), str(text))
        return value

    async def expect(self, kind: type, *, within_s: float = ANSWER_S) -> object:
        while not isinstance(value := await self.receive(within_s=within_s), kind):
            pass
        return value

    async def ask(self, method: Frame, answer: type) -> object:
        """Raises ClosedError."""
        self.send(method)
        return await self.expect(answer)

    async def depth(self, queue: str) -> int:
        """Messages that wait in it."""
        found = await self.ask(commands.Queue.Declare(queue=queue, passive=True), commands.Queue.DeclareOk)
        return found.message_count

    async def publish(self, exchange: str, body: bytes, properties: commands.Basic.Properties | bytes, **more: object) -> str:
        """With `confirms`: "confirmed", "returned" or "rejected". Raises ClosedError."""
        await self.write(publishing(exchange, body, properties, **more))
        self.published += 1
        outcome = "confirmed"
        while self._confirmed < self.published:
            match await self.receive():
                case commands.Basic.Ack(delivery_tag=tag):
                    self._confirmed = tag
                case commands.Basic.Nack(delivery_tag=tag):
                    self._confirmed, outcome = tag, "rejected"
                case commands.Basic.Return():
                    outcome = "returned"
        return outcome

    async def next_message(self, *, within_s: float = ANSWER_S) -> tuple[commands.Basic.Deliver, ContentHeader, bytes]:
        """Of a consumer. Raises ClosedError, TimeoutError."""
        deliver = await self.expect(commands.Basic.Deliver, within_s=within_s)
        header = await self.expect(ContentHeader)
        body = b""
        while len(body) < header.body_size:
            part = await self.expect(ContentBody)
            body += part.value
        return deliver, header, body

    async def close(self) -> None:
        """As one does, so that the broker counts it no more; or what is left of it."""
        with suppress(ClosedError, TimeoutError, ConnectionError):
            self.send(commands.Connection.Close(200, "", 0, 0), channel=0)
            await self.expect(commands.Connection.CloseOk, within_s=1.0)
        self._writer.transport.abort()


@asynccontextmanager
async def raw_connection(
    url: str, *, user: str = "", password: str = "", vhost: str | None = None
) -> AsyncIterator[RawConnection]:
    """Logged in as the URL says, or as another, with channel 1 open. Raises ClosedError."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    connection = RawConnection(reader, writer)
    try:
        await connection.login(
            user or unquote(parts.username or ""),
            password or unquote(parts.password or ""),
            (unquote(parts.path.removeprefix("/")) or "/") if vhost is None else vhost,
        )
        await connection.open_channel()
        yield connection
    finally:
        await connection.close()
