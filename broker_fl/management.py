"""RabbitMQ's management API: a federation's topology, users and permissions, and what the broker says of itself."""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    ManagementError,
    NotFoundError,
    TopologyConflictError,
)
from broker_fl.topology import Binding, Exchange, Permissions, Policy, Queue, Topology

Body = Mapping[str, object]
Item = TypeVar("Item")
Answer = TypeVar("Answer")

PAGE_SIZE = 100
QUEUE_COLUMNS = "name,type,messages_ready,messages_unacknowledged,message_bytes,consumers"


@dataclass(frozen=True, slots=True)
class Overview:
    rabbitmq_version: str
    management_version: str


@dataclass(frozen=True, slots=True)
class User:
    name: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueueState:
    """Counted by the broker every few seconds. `bytes` and `consumers` are None where only totals were asked for."""

    name: str
    type: str
    ready: int
    unacknowledged: int
    bytes: int | None
    consumers: int | None


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """`name` is what the client calls itself, else what RabbitMQ calls the connection."""

    name: str
    user: str
    peer: str
    connected_at: datetime


class _UserAnswer(BaseModel):
    name: str
    tags: list[str]


class _QueueAnswer(BaseModel):
    # A queue that was just declared, and a stream on 3.10, have no figures at all.
    name: str
    type: str = ""
    messages_ready: int | None = None
    messages_unacknowledged: int | None = None
    message_bytes: int | None = None
    consumers: int | None = None

    def state(self) -> QueueState:
        return QueueState(
            name=self.name,
            type=self.type,
            ready=self.messages_ready or 0,
            unacknowledged=self.messages_unacknowledged or 0,
            bytes=self.message_bytes,
            consumers=self.consumers,
        )


class _ConnectionAnswer(BaseModel):
    name: str
    vhost: str = ""
    user: str = ""
    peer_host: str = ""
    peer_port: int = 0
    connected_at: int = 0
    client_properties: dict[str, Any] = {}

    def state(self) -> ConnectionState:
        # Any client may send anything as its properties.
        own_name = self.client_properties.get("connection_name")
        return ConnectionState(
            name=own_name if isinstance(own_name, str) and own_name else self.name,
            user=self.user,
            peer=f"{self.peer_host}:{self.peer_port}",
            connected_at=datetime.fromtimestamp(self.connected_at / 1000, UTC),
        )


class _PolicyAnswer(BaseModel):
    name: str


class _OverviewAnswer(BaseModel):
    rabbitmq_version: str
    management_version: str


class _Page(BaseModel, Generic[Item]):
    items: list[Item]
    page_count: int


class _Refusal(BaseModel):
    reason: Any = ""


class Management:
    """One vhost, seen with one user's rights. Entering it opens nothing yet: the first request connects."""

    def __init__(self, url: str, *, vhost: str = "/", timeout_s: float = 30.0) -> None:
        """`url` holds the name and the password: http://USER:PASSWORD@HOST:15672."""
        self._base, self._user, self._password = _parts(url)
        self._vhost = vhost
        self._timeout_s = timeout_s
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"Management({self._base!r}, user={self._user!r}, vhost={self._vhost!r})"

    async def __aenter__(self) -> Self:
        # No proxies from the environment: AMQP knows none either, and a broker on this machine is not behind one.
        self._client = httpx.AsyncClient(
            auth=(self._user, self._password.get_secret_value()),
            timeout=httpx.Timeout(self._timeout_s, connect=min(5.0, self._timeout_s)),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def overview(self) -> Overview:
        answer = _parsed(_OverviewAnswer, await self._request("GET", _path("overview")))
        return Overview(answer.rabbitmq_version, answer.management_version)

    async def apply(self, topology: Topology) -> None:
        """Make what is not there; what is there already, with the same arguments, stays as it is.

        Nothing is removed. TopologyConflictError: something is there with other arguments.
        """
        for exchange in topology.exchanges:
            await self._put_exchange(exchange)
        for queue in topology.queues:
            await self._put_queue(queue)
        for binding in topology.bindings:
            await self._post_binding(binding)

    async def apply_policies(self, policies: Iterable[Policy]) -> None:
        """Make those that are missing; one that is there stays as it is, since an operator may have changed it."""
        answers = _parsed(list[_PolicyAnswer], await self._request("GET", _path("policies", self._vhost)))
        known = {answer.name for answer in answers}
        for policy in policies:
            if policy.name in known:
                continue
            body = {
                "pattern": policy.pattern,
                "apply-to": policy.apply_to,
                "definition": dict(policy.definition),
                "priority": policy.priority,
            }
            await self._request("PUT", _path("policies", self._vhost, policy.name), body)

    async def _put_exchange(self, exchange: Exchange) -> None:
        body: Body = {"type": exchange.kind, "durable": True, "auto_delete": False, "arguments": {}}
        await self._request("PUT", _path("exchanges", self._vhost, exchange.name), body)

    async def _put_queue(self, queue: Queue) -> None:
        body = {"durable": True, "auto_delete": False, "arguments": queue.all_arguments()}
        await self._request("PUT", _path("queues", self._vhost, queue.name), body)

    async def _post_binding(self, binding: Binding) -> None:
        body: Body = {"routing_key": binding.routing_key, "arguments": {}}
        await self._request("POST", _path("bindings", self._vhost, "e", binding.exchange, "q", binding.queue), body)

    async def delete_exchange(self, name: str) -> None:
        await self._request("DELETE", _path("exchanges", self._vhost, name))

    async def delete_queue(self, name: str) -> None:
        """With the messages in it."""
        await self._request("DELETE", _path("queues", self._vhost, name))

    async def delete_policy(self, name: str) -> None:
        await self._request("DELETE", _path("policies", self._vhost, name))

    async def put_user(self, name: str, password: SecretStr, tags: Iterable[str] = ()) -> None:
        """Make the user, or give it this password and these tags in place of what it had."""
        body = {"password": password.get_secret_value(), "tags": ",".join(tags)}
        await self._request("PUT", _path("users", name), body)

    async def put_permissions(self, user: str, permissions: Permissions) -> None:
        """In this vhost, in place of what the user had."""
        body = {"configure": permissions.configure, "write": permissions.write, "read": permissions.read}
        await self._request("PUT", _path("permissions", self._vhost, user), body)

    async def delete_user(self, name: str) -> None:
        """From the whole broker, which closes the user's connections within 2 s (measured on 3.10).

        Taking away permissions alone does not revoke: a busy channel went on publishing for more than 5 s.
        """
        await self._request("DELETE", _path("users", name))

    async def list_users(self) -> tuple[User, ...]:
        """Of the whole broker."""
        answers = _parsed(list[_UserAnswer], await self._request("GET", _path("users")))
        return tuple(User(answer.name, tuple(answer.tags)) for answer in answers)

    async def user_exists(self, name: str) -> bool:
        try:
            await self._request("GET", _path("users", name))
        except NotFoundError:
            return False
        return True

    async def put_vhost(self) -> None:
        """This object's own. Its creator gets all permissions in it."""
        await self._request("PUT", _path("vhosts", self._vhost), {})

    async def delete_vhost(self) -> None:
        """This object's own, with all that is in it."""
        await self._request("DELETE", _path("vhosts", self._vhost))

    async def queues(self, prefix: str = "", *, only_totals: bool = False) -> tuple[QueueState, ...]:
        """Those whose names begin so. `only_totals` costs the broker a twentieth where there are thousands."""
        figures: dict[str, str] = {"columns": QUEUE_COLUMNS}
        if only_totals:
            figures = {"disable_stats": "true", "enable_queue_totals": "true"}
        chosen = {"name": f"^{re.escape(prefix)}", "use_regex": "true", **figures}
        answers = self._pages(_Page[_QueueAnswer], _path("queues", self._vhost), chosen)
        return tuple([answer.state() async for answer in answers])

    async def connections(self) -> tuple[ConnectionState, ...]:
        """To this vhost. One that just opened takes up to a few seconds to appear."""
        # /vhosts/V/connections knows no pages on 3.10.
        answers = self._pages(_Page[_ConnectionAnswer], _path("connections"), {})
        return tuple([answer.state() async for answer in answers if answer.vhost == self._vhost])

    async def _pages(self, kind: type[_Page[Item]], path: str, chosen: Mapping[str, str]) -> AsyncIterator[Item]:
        number, count = 1, 1
        while number <= count:
            parameters = {**chosen, "page": str(number), "page_size": str(PAGE_SIZE)}
            page = _parsed(kind, await self._request("GET", path, parameters=parameters))
            for item in page.items:
                yield item
            number, count = number + 1, page.page_count

    async def _request(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        *,
        parameters: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        if self._client is None:
            raise ManagementError("Management is used within its `async with` only")
        url = f"{self._base}/api/{path}"
        try:
            response = await self._client.request(method, url, json=body, params=parameters)
        except httpx.RequestError as exc:
            raise BrokerUnavailableError(
                f"RabbitMQ's management API does not answer at {self._base} ({_cause(exc)}): start RabbitMQ, see that "
                "the plugin is on (rabbitmq-plugins enable rabbitmq_management) and the port is the plugin's (15672)"
            ) from exc
        if not response.is_success:
            raise _refused(response, f"{method} {url}", user=self._user)
        return response


def _parts(url: str) -> tuple[str, str, SecretStr]:
    """Where to, as whom, with which password."""
    expected = "expected http://USER:PASSWORD@HOST:15672 as the URL of the management API"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        # Its text may hold a piece of the password.
        raise ConfigurationError(f"{expected}, got something else") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigurationError(f"{expected}, got the scheme {parsed.scheme!r} and the host {parsed.host!r}")
    if not parsed.username or not parsed.password:
        raise ConfigurationError(f"{expected}, got no name or no password")
    return str(parsed.copy_with(userinfo=b"")).rstrip("/"), parsed.username, SecretStr(parsed.password)


def _path(*parts: str) -> str:
    """The vhost / is %2F."""
    return "/".join(quote(part, safe="") for part in parts)


def _parsed(kind: type[Answer], response: httpx.Response) -> Answer:
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as exc:
        what = f"{exc.error_count()} unexpected fields, the first: {_one_line(exc.errors()[0]['msg'])}"
        raise ManagementError(f"{response.url} does not answer as RabbitMQ does ({what})") from exc


def _refused(response: httpx.Response, what: str, *, user: str) -> BrokerError:
    reason = _reason(response)
    text = f"{what}: {response.status_code}, {reason}"
    match response.status_code:
        case 401 if "user" in reason.lower():
            # "Not management user", "Not administrator user", "User not authorised to access virtual host".
            return AccessRefusedError(f"{text}: give {user!r} the right or the tag that this needs")
        case 401:
            return AuthenticationError(f"{text}: wrong name or password for {user!r}")
        case 403:
            return AccessRefusedError(f"{text}: {user!r} may not do this")
        case 404:
            return NotFoundError(text)
        case 400 if "inequivalent" in reason:
            return TopologyConflictError(f"{text}: delete it, or take another name")
        case 400 if "not_found" in reason:
            # Permissions for a user or in a vhost that is not there.
            return NotFoundError(text)
        case _:
            return ManagementError(text)


def _reason(response: httpx.Response) -> str:
    try:
        reason = _Refusal.model_validate_json(response.content).reason
    except ValidationError:
        reason = response.reason_phrase
    return _one_line(str(reason))[:300]


def _cause(error: httpx.RequestError) -> str:
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
