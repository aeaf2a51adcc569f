"""From a training to the update that is sent and what stays behind; sparser where the party's budget asks for it."""

import sys
from dataclasses import dataclass

import numpy as np
import structlog

from broker_fl.codecs.budget import encode_within, fitted, sparsest
from broker_fl.codecs.codec import Codec, decode, encode, parse_codec
from broker_fl.codecs.feedback import corrected, left_over, masked
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import Vector
from schemas import wire
from schemas.frame import Plan
from schemas.manifest import Manifest
from schemas.privacy import PrivacyFacts
from schemas.update import ModelUpdate

_BINARY_HEADER = 3
"""A payload's length takes so many bytes more than that of an empty one."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Budget:
    """What an update may cost, all fields together."""

    bytes: int | None = None
    seconds: float | None = None
    """To send it, once the line is measured."""

    def seconds_bytes(self, uplink_bytes_per_s: float | None) -> int | None:
        if self.seconds is None or uplink_bytes_per_s is None:
            return None
        return int(min(self.seconds * uplink_bytes_per_s, sys.maxsize))


@dataclass(frozen=True, slots=True)
class Encoded:
    payload: bytes
    codec: Codec
    residual: Vector
    """What the payload leaves out, for the next update."""
    velocity: Vector | None
    """Of momentum correction; None without it."""


def encode_update(
    delta: Vector,
    *,
    residual: Vector | None,
    velocity: Vector | None,
    plan: Plan,
    manifest: Manifest,
    budget: Budget,
    uplink_bytes_per_s: float | None,
    fields_bytes: int,
    generator: np.random.Generator,
) -> Encoded:
    """Of a finite delta, shape (manifest.size,). `fields_bytes` is what the other fields of the update take of the budget.

    Raises ConfigurationError where the sparsest update is over the budget in bytes.
    """
    target, moved = corrected(delta, residual, velocity, momentum=plan.momentum_correction)
    asked = parse_codec(plan.update_codec)
    payload, codec = _within(
        target,
        asked,
        most_bytes=_less(budget.bytes, fields_bytes),
        aim_bytes=_less(budget.seconds_bytes(uplink_bytes_per_s), fields_bytes),
        manifest=manifest,
        generator=generator,
    )
    if codec != asked:
        log.info("a sparser update, to stay within the budget", asked=asked.name, codec=codec.name, bytes=len(payload))
    sent = decode(payload, codec, manifest=manifest)
    return Encoded(payload, codec, left_over(target, sent), masked(moved, sent))


def fields_bytes(*, federation: str, party: str, is_noised: bool) -> int:
    """The most that an update takes beside its payload."""
    privacy = PrivacyFacts(noise_multiplier=0.5, sample_rate=0.5, max_grad_norm=0.5) if is_noised else None
    largest = ModelUpdate(
        federation=federation,
        ledger="0" * 32,
        party=party,
        update_id="0" * 32,
        sequence=2**53 - 1,
        base_version=2**53 - 1,
        base_digest="0" * 64,
        manifest_digest="0" * 64,
        codec="x" * 64,
        num_samples=10**12,
        num_steps=2**53 - 1,
        train_loss=0.5,
        privacy=privacy,
        payload=b"",
    )
    return len(wire.encode(largest)) + _BINARY_HEADER


def check_budget(budget: Budget, *, codec: str, manifest: Manifest, fields_bytes: int) -> None:
    """Raises ConfigurationError for one that no update in this codec, however sparse, stays within."""
    parsed = parse_codec(codec)
    if budget.bytes is None or parsed.density is None:
        return
    try:
        fitted(parsed, max(0, budget.bytes - fields_bytes), manifest=manifest)
    except ConfigurationError as exc:
        fields = f"{fields_bytes} bytes of an update go to its other fields, and {budget.bytes} are allowed"
        raise ConfigurationError(f"[worker] budget: {fields}; for the rest, {exc}") from exc


def _less(limit: int | None, taken: int) -> int | None:
    return None if limit is None else limit - taken


def _within(
    target: Vector,
    codec: Codec,
    *,
    most_bytes: int | None,
    aim_bytes: int | None,
    manifest: Manifest,
    generator: np.random.Generator,
) -> tuple[bytes, Codec]:
    limits = [limit for limit in (most_bytes, aim_bytes) if limit is not None]
    if not limits or codec.density is None:
        payload = encode(target, codec, manifest=manifest, generator=generator)
        if limits and len(payload) > min(limits):
            log.warning("over the budget: the federation's codec has no density to lower", codec=codec.name, bytes=len(payload))
        return payload, codec
    try:
        return encode_within(target, codec, min(limits), manifest=manifest, generator=generator)
    except ConfigurationError:
        if most_bytes is not None and min(limits) == most_bytes:
            raise
    # How fast the line was may change: that is an aim, and no reason to send nothing.
    bound = sys.maxsize if most_bytes is None else most_bytes
    least = sparsest(codec, manifest=manifest)
    payload, codec = encode_within(target, least, bound, manifest=manifest, generator=generator)
    log.warning("no update is small enough for the time budget: the sparsest is sent", bytes=len(payload), budget=aim_bytes)
    return payload, codec
