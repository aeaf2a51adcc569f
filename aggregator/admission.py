"""Whether an update may be merged. Pure: facts in, a verdict out.

First `examine`, which needs nothing but the message and the federation's constants and may run for many messages at once; then
`admit`, against the state of the model at the update's turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aggregator.merging.fold import State, Strategy
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.errors import ConfigurationError, DecodeError
from broker_fl.privacy.policy import Demands
from broker_fl.signing import is_signed, payload_digest, update_statement
from broker_fl.topology import Names
from schemas import wire
from schemas.ids import Digest, is_name
from schemas.manifest import Manifest
from schemas.membership import SignedMembership
from schemas.receipt import Reason
from schemas.update import ModelUpdate

MAX_MAGNITUDE = 1e6
"""Of a delta's element. No trained weight comes near it, and no number of merges within it can make the model overflow."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this federation takes."""

    names: Names
    manifest: Manifest
    max_update_bytes: int
    max_update_norm: float | None
    privacy: Demands | None = None
    """None where updates need no noise."""
    signed_for: str | None = None
    """The ledger that signed updates have to name; None where they need no signature."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent it, by what the broker checked, and under which id."""

    party: str
    update_id: str


@dataclass(frozen=True, slots=True)
class Credentials:
    """By what else than the broker's word a sender is known."""

    membership: SignedMembership | None = None
    signature: object = None
    """As it came with the message: anything."""


ANONYMOUS = Credentials()


@dataclass(frozen=True, slots=True)
class Refused:
    reason: Reason
    detail: str
    update: ModelUpdate | None = field(default=None, compare=False, repr=False)
    """Where it could be read, and came from whom it says."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A well-formed update and its decoded delta."""

    update: ModelUpdate
    delta: Delta
    payload_digest: str
    """BLAKE3 of the payload, for the ledger."""
    norm: float
    """Of the delta, L2."""
    signature: str | None = None
    """The party's; None where none is asked for."""


def identify(*, exchange: str, user_id: str | None, message_id: str, names: Names) -> Sender | Refused:
    """The broker's word for who sent it: only a party may write to its exchange, and user_id is checked where it is given."""
    party = names.party_of(exchange)
    if party is None or not is_name(party):
        return Refused("identity", f"came through {exchange!r}, which is no party's exchange")
    if user_id is None:
        return Refused("identity", "has no user_id property: set it to the login's name, so that the broker can check it")
    if user_id != party:
        return Refused("identity", f"came from user {user_id!r} through the exchange of party {party!r}")
    if re.fullmatch(r"[0-9a-f]{32}", message_id) is None:
        return Refused("malformed", "the message_id property must be the update id: 32 lower-case hexadecimal digits")
    return Sender(party, message_id)


def examine(body: bytes, sender: Sender, limits: Limits, credentials: Credentials = ANONYMOUS) -> Examined | Refused:
    """All checks that need no state: size, schema, identity within, federation, manifest, signature, codec, finiteness, norm."""
    if len(body) > limits.max_update_bytes:
        return Refused("bounds", f"{len(body)} bytes are over this federation's {limits.max_update_bytes} for an update")
    try:
        update = wire.decode(ModelUpdate, body)
    except DecodeError as exc:
        return Refused("malformed", str(exc))
    misaddressed = _misaddressed(update, sender, limits)
    if misaddressed:
        return misaddressed
    digest = payload_digest(update.payload)
    if limits.signed_for is not None:
        unsigned = _unsigned(update, credentials, digest=digest, ledger=limits.signed_for)
        if unsigned is not None:
            return unsigned
    boasting = _boasting(update, credentials)
    if boasting is not None:
        return replace(boasting, update=update)
    found = _unprotected(update, limits) or _decoded(update, limits, digest=digest)
    if isinstance(found, Refused):
        return replace(found, update=update)
    return found if limits.signed_for is None else replace(found, signature=str(credentials.signature))


def _unsigned(update: ModelUpdate, credentials: Credentials, *, digest: str, ledger: str) -> Refused | None:
    """Not by its party, or not for this ledger. What such an update says cost nobody any privacy: it may be anyone's word."""
    if credentials.membership is None:
        return Refused(
            "signature", f"party {update.party!r} is not in the federation's register: `broker-fl party add` enrols it"
        )
    key = credentials.membership.membership.public_key
    if key is None:
        return Refused("signature", f"party {update.party!r} was enrolled without a key: `broker-fl party rotate` gives it one")
    if not is_signed("update", update_statement(update, payload_digest=digest), credentials.signature, by=key):
        return Refused("signature", f"is not signed by the key {key[:12]} that party {update.party!r} was enrolled with")
    if update.ledger != ledger:
        # Nobody's fault: of what a party has in its outbox where the federation begins anew.
        return Refused("base", f"was trained from a frame of ledger {(update.ledger or 'none')[:12]}, not {ledger[:12]}")
    return None


def _boasting(update: ModelUpdate, credentials: Credentials) -> Refused | None:
    """Where updates weigh by their examples, who says more would have the model to himself."""
    agreed = None if credentials.membership is None else credentials.membership.membership.num_samples
    if agreed is None or update.num_samples <= agreed:
        return None
    return Refused(
        "samples",
        f"says {update.num_samples} examples, and its party was enrolled with {agreed}: `broker-fl party set --num-samples` "
        "changes that",
    )


def _decoded(update: ModelUpdate, limits: Limits, *, digest: str) -> Examined | Refused:
    try:
        delta = decode(update.payload, parse_codec(update.codec), manifest=limits.manifest)
    except (ConfigurationError, DecodeError) as exc:
        return Refused("codec", str(exc))
    norm = delta.norm()
    return _out_of_bounds(delta, limits, norm=norm) or Examined(update, delta, digest, norm)


def _misaddressed(update: ModelUpdate, sender: Sender, limits: Limits) -> Refused | None:
    if update.party != sender.party:
        return Refused("identity", f"says it is from {update.party!r}, but {sender.party!r} sent it")
    if update.update_id != sender.update_id:
        return Refused("malformed", "update_id differs from the message_id property")
    if update.federation != limits.names.federation:
        return Refused("federation", f"is for federation {update.federation!r}")
    if update.manifest_digest != limits.manifest.digest:
        return Refused("manifest", f"is for the model {update.manifest_digest[:12]}, not {limits.manifest.digest[:12]}")
    return None


def _unprotected(update: ModelUpdate, limits: Limits) -> Refused | None:
    shortfall = limits.privacy.shortfall(update.privacy) if limits.privacy is not None else None
    return None if shortfall is None else Refused("privacy", shortfall)


def _out_of_bounds(delta: Delta, limits: Limits, *, norm: float) -> Refused | None:
    if not delta.is_finite():
        return Refused("non_finite", "holds NaN or infinity")
    largest = delta.largest()
    if largest > MAX_MAGNITUDE:
        return Refused("bounds", f"holds a value of magnitude {largest:.3g}: {MAX_MAGNITUDE:g} is the most")
    if limits.max_update_norm is not None and norm > limits.max_update_norm:
        return Refused("bounds", f"its norm {norm:.4g} is over this federation's {limits.max_update_norm:g}")
    return None


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The versions after `to` and before `by`, which count no more."""

    to: int
    by: int

    def __contains__(self, version: int) -> bool:
        return self.to < version < self.by


def admit(
    examined: Examined,
    state: State,
    *,
    strategy: Strategy,
    frame_digests: Mapping[int, Digest],
    rolled_back: Sequence[RolledBack] = (),
) -> Refused | None:
    """The checks that depend on when its turn comes; None if it may be merged.

    `frame_digests` holds what was broadcast at each version within the staleness bound.
    """
    update = examined.update
    for gone in rolled_back:
        if update.base_version in gone:
            return Refused(
                "rolled_back", f"trained from version {update.base_version}, and version {gone.by} went back to {gone.to}"
            )
    staleness = state.version - update.base_version
    if staleness < 0:
        return Refused("base", f"trained from version {update.base_version}, and the model is at {state.version}")
    if staleness > strategy.max_staleness:
        return Refused("too_stale", f"{staleness} versions late, the bound is {strategy.max_staleness}")
    if frame_digests.get(update.base_version) != update.base_digest:
        return Refused("base", f"trained from a version {update.base_version} that this ledger never broadcast")
    if strategy.keeps_bases and update.base_version not in state.bases:
        return Refused("base", f"version {update.base_version} was broadcast before mixing began, or a rollback")
    if strategy.one_per_buffer and state.buffer is not None and update.party in state.buffer.parties:
        return Refused("repeated", f"there is an update of {update.party!r} in the buffer already")
    return None
