"""RabbitMQ's management API: a federation's topology, users and permissions, and what the broker says of itself."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
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
from broker_fl.tls import explained
from broker_fl.topology import Binding, Exchange, Permissions, Policy, Queue, Topology

Body = Mapping[str, object]
Item = TypeVar("Item")
Answer = TypeVar("Answer")

PAGE_SIZE = 500
"""The most that RabbitMQ gives."""
_CLOSE_ATTEMPTS = 5
_CLOSE_PAUSE_S = 0.1
QUEUE_COLUMNS = "name,type,messages_ready,messages_unacknowledged,message_bytes,consumers"


@dataclass(frozen=True, slots=True)
class Overview:
    rabbitmq_version: str
    management_version: str


@dataclass(frozen=True, slots=True)
class User:
    """`password_hash` is "" where no password lets the user in. `limits` are max-connections and max-channels."""

    name: str
    tags: tuple[str, ...]
    password_hash: str = field(default="", repr=False)
    hashing: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a vhost by declaration: kinds by name, and what is bound."""

    exchanges: Mapping[str, str]
    queues: Mapping[str, str]
    bindings: frozenset[Binding]


class _UserAnswer(BaseModel):
    name: str
    tags: list[str]
    password_hash: str = ""
    hashing_algorithm: str = ""
    limits: dict[str, int] = {}

    def user(self) -> User:
        return User(self.name, tuple(self.tags), self.password_hash, self.hashing_algorithm, self.limits)


class _PermissionsAnswer(BaseModel):
    user: str
    vhost: str
    configure: str
    write: str
    read: str


class _ParameterAnswer(BaseModel):
    name: str
    value: object


class _ExchangeAnswer(BaseModel):
    name: str
    type: str


class _DefinedQueue(BaseModel):
    name: str
    type: str = ""
    """RabbitMQ 3.10 says it among the arguments alone."""
    arguments: dict[str, Any] = {}


class _DefinedBinding(BaseModel):
    source: str
    destination: str
    destination_type: str
    routing_key: str


class _DefinitionsAnswer(BaseModel):
    exchanges: list[_ExchangeAnswer]
    queues: list[_DefinedQueue]
    bindings: list[_DefinedBinding]


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

    def __init__(self, url: str, *, vhost: str = "/", timeout_s: float = 30.0, tls: ssl.SSLContext | None = None) -> None:
        """`url` holds the name and the password: http://USER:PASSWORD@HOST:15672. `tls` is for https, where the machine's own
        certificates are not enough."""
        self._base, self._user, self._password = _parts(url)
        self._tls = tls
        self._vhost = vhost
        self._timeout_s = timeout_s
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"Management({self._base!r}, user={self._user!r}, vhost={self._vhost!r})"

    @property
    def vhost(self) -> str:
        return self._vhost

    async def __aenter__(self) -> Self:
        # No proxies from the environment: AMQP knows none either, and a broker on this machine is not behind one.
        self._client = httpx.AsyncClient(
            auth=(self._user, self._password.get_secret_value()),
            timeout=httpx.Timeout(self._timeout_s, connect=min(5.0, self._timeout_s)),
            trust_env=False,
            # Without TLS no certificates need to be read, which takes 30 ms.
            verify=(self._tls or True) if self._base.startswith("https:") else False,
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
        await self._apply_policies("policies", policies)

    async def apply_operator_policies(self, policies: Iterable[Policy]) -> None:
        """Likewise. They bound what all others say, arguments and policies."""
        await self._apply_policies("operator-policies", policies)

    async def _apply_policies(self, kind: str, policies: Iterable[Policy]) -> None:
        answers = _parsed(list[_PolicyAnswer], await self._request("GET", _path(kind, self._vhost)))
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
            await self._request("PUT", _path(kind, self._vhost, policy.name), body)

    async def import_definitions(self, definitions: Body) -> None:
        """All in one piece, as broker_fl/definitions.py renders them: 10,000 users and permissions took 6 s (on 3.10)."""
        await self._request("POST", _path("definitions"), definitions)

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

    async def delete_operator_policy(self, name: str) -> None:
        await self._request("DELETE", _path("operator-policies", self._vhost, name))

    async def put_user(self, name: str, password: SecretStr | None, tags: Iterable[str] = ()) -> None:
        """Make the user, or give it this password and these tags in place of what it had. Without a password, no password lets it
        in: it logs in by its certificate."""
        secret = {"password_hash": ""} if password is None else {"password": password.get_secret_value()}
        await self._request("PUT", _path("users", name), {**secret, "tags": ",".join(tags)})

    async def put_user_limits(self, name: str, limits: Mapping[str, int]) -> None:
        """max-connections, max-channels: of new ones. Who is over them stays connected."""
        for limit, value in limits.items():
            await self._request("PUT", _path("user-limits", name, limit), {"value": value})

    async def put_vhost_limits(self, limits: Mapping[str, int]) -> None:
        """max-connections, max-queues of this vhost."""
        for limit, value in limits.items():
            await self._request("PUT", _path("vhost-limits", self._vhost, limit), {"value": value})

    async def put_permissions(self, user: str, permissions: Permissions) -> None:
        """In this vhost, in place of what the user had."""
        body = {"configure": permissions.configure, "write": permissions.write, "read": permissions.read}
        await self._request("PUT", _path("permissions", self._vhost, user), body)

    async def delete_permissions(self, user: str) -> None:
        """In this vhost. Who is connected keeps what it has for a while: `close_connections` ends that."""
        await self._request("DELETE", _path("permissions", self._vhost, user))

    async def permissions_of(self, user: str) -> dict[str, Permissions]:
        """By vhost; nothing for a user that is not there."""
        try:
            answer = await self._request("GET", _path("users", user, "permissions"))
        except NotFoundError:
            return {}
        granted = _parsed(list[_PermissionsAnswer], answer)
        return {one.vhost: Permissions(one.configure, one.write, one.read) for one in granted}

    async def permissions(self) -> dict[str, dict[str, Permissions]]:
        """Of all users in all vhosts: by user, then by vhost."""
        found: dict[str, dict[str, Permissions]] = {}
        for one in await self._all_of(_PermissionsAnswer, _path("permissions")):
            found.setdefault(one.user, {})[one.vhost] = Permissions(one.configure, one.write, one.read)
        return found

    async def delete_user(self, name: str) -> None:
        """From the whole broker, which closes the user's connections within 2 s (measured on 3.10).

        Taking away permissions alone does not revoke: a busy channel went on publishing for more than 5 s.
        """
        await self._request("DELETE", _path("users", name))

    async def list_users(self) -> tuple[User, ...]:
        """Of the whole broker."""
        answers = await self._all_of(_UserAnswer, _path("users"))
        return tuple(answer.user() for answer in answers)

    async def user(self, name: str) -> User | None:
        try:
            answer = await self._request("GET", _path("users", name))
        except NotFoundError:
            return None
        return _parsed(_UserAnswer, answer).user()

    async def user_exists(self, name: str) -> bool:
        return await self.user(name) is not None

    async def global_parameter(self, name: str) -> object:
        """None where there is none. Global parameters belong to the whole broker. An empty object is read as an empty list."""
        try:
            answer = await self._request("GET", _path("global-parameters", name))
        except NotFoundError:
            return None
        return _parsed(_ParameterAnswer, answer).value

    async def global_parameters(self, prefix: str = "") -> dict[str, object]:
        """Those whose names begin so, without it. RabbitMQ sends all there are, whichever are wanted."""
        answers = await self._all_of(_ParameterAnswer, _path("global-parameters"))
        return {answer.name.removeprefix(prefix): answer.value for answer in answers if answer.name.startswith(prefix)}

    async def put_global_parameter(self, name: str, value: object) -> None:
        await self._request("PUT", _path("global-parameters", name), {"value": value})

    async def delete_global_parameter(self, name: str) -> None:
        await self._request("DELETE", _path("global-parameters", name))

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

    async def queue(self, name: str) -> QueueState | None:
        try:
            answer = await self._request("GET", _path("queues", self._vhost, name))
        except NotFoundError:
            return None
        return _parsed(_QueueAnswer, answer).state()

    async def exchanges(self, prefix: str = "") -> dict[str, str]:
        """Kinds by name, of those that begin so."""
        chosen = {"name": f"^{re.escape(prefix)}", "use_regex": "true", "columns": "name,type"}
        answers = self._pages(_Page[_ExchangeAnswer], _path("exchanges", self._vhost), chosen)
        return {answer.name: answer.type async for answer in answers}

    async def found(self) -> Found:
        """All that this vhost has by declaration, in one answer: 10,000 parties are 5 MB and take 1 s (measured on 3.10)."""
        response = await self._request("GET", _path("definitions", self._vhost))
        answer = await asyncio.to_thread(_parsed, _DefinitionsAnswer, response)
        return Found(
            exchanges={exchange.name: exchange.type for exchange in answer.exchanges},
            queues={queue.name: queue.arguments.get("x-queue-type", queue.type) for queue in answer.queues},
            bindings=frozenset(
                Binding(binding.source, binding.destination, binding.routing_key)
                for binding in answer.bindings
                if binding.destination_type == "queue"
            ),
        )

    async def connections_of(self, user: str) -> dict[str, str]:
        """Vhosts by RabbitMQ's name of the connection, of those that are open in any vhost. It knows of one some milliseconds
        after it was opened."""
        try:
            answer = await self._request("GET", _path("connections", "username", user))
        except NotFoundError:
            return {}
        return {found.name: found.vhost for found in _parsed(list[_ConnectionAnswer], answer)}

    async def connection(self, name: str) -> ConnectionState | None:
        """By RabbitMQ's name of it."""
        try:
            answer = await self._request("GET", _path("connections", name))
        except NotFoundError:
            return None
        return _parsed(_ConnectionAnswer, answer).state()

    async def close_connections(self, user: str, reason: str) -> int:
        """All of the user's, in all vhosts, and those that it was just opening; gives how many there were. They end within 0.1 s,
        busy or not (measured on 3.10). Nothing counts any more that a client sends which does not answer the end; RabbitMQ drops
        it after 30 s."""
        closed: set[str] = set()
        for attempt in range(_CLOSE_ATTEMPTS):
            found = await self.connections_of(user)
            closed |= found.keys()
            # One by one it could close only those that have figures already, which takes seconds.
            await self._request("DELETE", _path("connections", "username", user), headers={"X-Reason": reason})
            if attempt and not found:
                break
            await asyncio.sleep(_CLOSE_PAUSE_S)
        return len(closed)

    async def connections(self) -> tuple[ConnectionState, ...]:
        """To this vhost. One that just opened takes up to a few seconds to appear."""
        # /vhosts/V/connections knows no pages on 3.10.
        answers = self._pages(_Page[_ConnectionAnswer], _path("connections"), {})
        return tuple([answer.state() async for answer in answers if answer.vhost == self._vhost])

    async def _all_of(self, kind: type[Item], path: str) -> list[Item]:
        """Of a list without pages. In a thread: it may be of tens of thousands."""
        response = await self._request("GET", path)
        return await asyncio.to_thread(_parsed, list[kind], response)  # type: ignore[valid-type]

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
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        if self._client is None:
            raise ManagementError("Management is used within its `async with` only")
        url = f"{self._base}/api/{path}"
        request = self._client.build_request(method, url, json=body, params=parameters, headers=headers)
        try:
            response = await _sent(self._client, request)
        except (httpx.RequestError, ssl.SSLError) as exc:  # httpx lets TLS errors of its reads through as they are.
            raise await self._unanswered(exc) from exc
        if not response.is_success:
            raise _refused(response, f"{method} {url}", user=self._user)
        return response

    async def _unanswered(self, exc: httpx.RequestError | ssl.SSLError) -> BrokerError:
        url = httpx.URL(self._base)
        if url.scheme == "https":
            found = await explained(
                exc,
                where=f"the management API at {self._base}",
                address=(url.host, url.port or 443),
                context=self._tls or httpx.create_ssl_context(),
                own=None,
                hung_up=isinstance(exc, httpx.RemoteProtocolError),
            )
            if found is not None:
                return found
        return BrokerUnavailableError(
            f"RabbitMQ's management API does not answer at {self._base} ({_cause(exc)}): start RabbitMQ, see that "
            "the plugin is on (rabbitmq-plugins enable rabbitmq_management) and the port is the plugin's (15672)"
        )


async def _sent(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """Twice, where RabbitMQ hung up before it answered, as it does with a connection on which nothing came for some seconds. What
    is posted is not repeated; a deletion may find that it was done."""
    try:
        return await client.send(request)
    except httpx.RemoteProtocolError:
        if request.method == "POST":
            raise
        return await client.send(request)


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
        case 400 if "not_found" in reason or "no_such_" in reason:
            # Permissions or limits for a user, or in a vhost, that is not there.
            return NotFoundError(text)
        case _:
            return ManagementError(text)


def _reason(response: httpx.Response) -> str:
    try:
        reason = _Refusal.model_validate_json(response.content).reason
    except ValidationError:
        reason = response.reason_phrase
    return _one_line(str(reason))[:300]


def _cause(error: Exception) -> str:
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
