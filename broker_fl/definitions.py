"""Definitions: what RabbitMQ imports in one piece, from a file at its start or by POST /api/definitions.

RabbitMQ makes users and virtual hosts first, then permissions, exchanges, parameters and policies, then queues and bindings (3.10
to 4.x): the logs of a federation and the policies that fix the size of their segments may come in one piece. What is there before
gets what the definitions say (users, permissions, policies) or stays as it is (exchanges, queues, bindings); nothing is removed.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from broker_fl.topology import (
    Binding,
    Exchange,
    InboxLimits,
    Permissions,
    Policy,
    Queue,
    Topology,
    aggregator_permissions,
    evaluator_permissions,
    leadership,
    operator_policies,
    policies,
    shared,
)

Definitions = dict[str, list[dict[str, object]]]
"""As JSON holds them."""

HASHING = "rabbit_password_hashing_sha256"
SALT_BYTES = 4

AGGREGATOR = "aggregator"
EVALUATOR = "evaluator"


@dataclass(frozen=True, slots=True)
class User:
    """Without a `password_hash` no password lets the user in: it logs in by its certificate."""

    name: str
    password_hash: str = field(default="", repr=False)
    tags: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    """max-connections, max-channels."""


def password_hash(password: str, *, salt: bytes) -> str:
    """As RabbitMQ keeps it: Base64 of salt and SHA-256 of salt and password. ValueError for a salt that has not 4 bytes."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"expected a salt of {SALT_BYTES} bytes, not {len(salt)}")
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def render(
    vhost: str,
    *topologies: Topology,
    users: Iterable[User] = (),
    permissions: Mapping[str, Permissions] | None = None,
    policies: Iterable[Policy] = (),
    operator_policies: Iterable[Policy] = (),
    vhost_limits: Mapping[str, int] | None = None,
    global_parameters: Mapping[str, object] | None = None,
) -> Definitions:
    """All of it in one virtual host, which is made where it is missing. `permissions` are by user, `vhost_limits` max-connections
    and max-queues; users and global parameters belong to the whole broker."""
    parameters: list[dict[str, object]] = [
        {"vhost": vhost, "component": "operator_policy", "name": policy.name, "value": _policy_value(policy)}
        for policy in operator_policies
    ]
    if vhost_limits:
        parameters.append({"vhost": vhost, "component": "vhost-limits", "name": "limits", "value": dict(vhost_limits)})
    return {
        "users": [_user(user) for user in users],
        "vhosts": [{"name": vhost}],
        "permissions": [_granted(vhost, user, granted) for user, granted in (permissions or {}).items()],
        "parameters": parameters,
        "global_parameters": [{"name": name, "value": value} for name, value in (global_parameters or {}).items()],
        "policies": [{"vhost": vhost, "name": policy.name, **_policy_value(policy)} for policy in policies],
        "exchanges": [_exchange(vhost, exchange) for topology in topologies for exchange in topology.exchanges],
        "queues": [_queue(vhost, queue) for topology in topologies for queue in topology.queues],
        "bindings": [_binding(vhost, binding) for topology in topologies for binding in topology.bindings],
    }


def federation_definitions(
    federation: str,
    *,
    vhost: str,
    model_bytes: int,
    aggregator: str = AGGREGATOR,
    evaluator: str = EVALUATOR,
    inbox: InboxLimits | None = None,
    vhost_limits: Mapping[str, int] | None = None,
) -> Definitions:
    """Of a federation without parties: all that is shared, its policies, and the two users that serve it, by certificate."""
    return render(
        vhost,
        leadership(federation),
        shared(federation),
        users=(User(aggregator), User(evaluator)),
        permissions={aggregator: aggregator_permissions(federation), evaluator: evaluator_permissions(federation)},
        policies=policies(federation, model_bytes=model_bytes),
        operator_policies=operator_policies(federation, inbox),
        vhost_limits=vhost_limits,
    )


def login_definitions(logins: Iterable[User], *, vhost: str) -> Definitions:
    """Of people and programs who use the management API, with all permissions in the virtual host."""
    users = tuple(logins)
    everything = Permissions(configure=".*", write=".*", read=".*")
    return render(vhost, users=users, permissions={user.name: everything for user in users})


def _user(user: User) -> dict[str, object]:
    return {
        "name": user.name,
        "password_hash": user.password_hash,
        "hashing_algorithm": HASHING,
        "tags": list(user.tags),
        "limits": dict(user.limits),
    }


def _granted(vhost: str, user: str, granted: Permissions) -> dict[str, object]:
    return {"user": user, "vhost": vhost, "configure": granted.configure, "write": granted.write, "read": granted.read}


def _policy_value(policy: Policy) -> dict[str, object]:
    return {
        "pattern": policy.pattern,
        "apply-to": policy.apply_to,
        "definition": dict(policy.definition),
        "priority": policy.priority,
    }


def _exchange(vhost: str, exchange: Exchange) -> dict[str, object]:
    return {
        "name": exchange.name,
        "vhost": vhost,
        "type": exchange.kind,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    }


def _queue(vhost: str, queue: Queue) -> dict[str, object]:
    return {
        "name": queue.name,
        "vhost": vhost,
        "durable": True,
        "auto_delete": False,
        "arguments": dict(queue.all_arguments()),
    }


def _binding(vhost: str, binding: Binding) -> dict[str, object]:
    return {
        "source": binding.exchange,
        "vhost": vhost,
        "destination": binding.queue,
        "destination_type": "queue",
        "routing_key": binding.routing_key,
        "arguments": {},
    }
