"""Who said it: Ed25519 signatures (RFC 8032) over statements of one kind, so that none passes for another. Pure.

    signed bytes = "broker-fl/" KIND "/1" 0x00 statement

A statement is the SHA-256 of a body (frames, keyframes, receipts), or canonical JSON: one object without spaces, its keys in
alphabetical order, fields that are not given left out, numbers as Python writes them (updates, memberships). An update's
statement holds what the ledger keeps of it, so that an auditor has it for as long as the ledger, payload or not.
"""

import hashlib
import json
import re
from typing import Literal, Self

import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from schemas.ids import LedgerId
from schemas.membership import Membership, SignedMembership
from schemas.update import ModelUpdate

Kind = Literal["frame", "receipt", "update", "membership"]

SIGNATURE = "x-fl-signature"
"""The header that a message's signature travels in: 128 lower-case hexadecimal digits. Parts carry that of the whole."""


class SigningKey:
    """A private key. Its text is 64 hexadecimal digits, and never shown."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Self:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Raises ValueError."""
        return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text)))

    def text(self) -> str:
        return self._private.private_bytes_raw().hex()

    def sign(self, kind: Kind, statement: bytes) -> str:
        return self._private.sign(_signed(kind, statement)).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public!r})"


def is_signed(kind: Kind, statement: bytes, signature: object, *, by: str) -> bool:
    """Whether the key `by` signed it. A signature is what somebody sent: it may be anything."""
    if not isinstance(signature, str) or re.fullmatch("[0-9a-f]{128}", signature) is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(by)).verify(bytes.fromhex(signature), _signed(kind, statement))
    except (InvalidSignature, ValueError):
        return False
    return True


def body_statement(body: bytes) -> bytes:
    """Of a frame, a keyframe, a receipt."""
    return hashlib.sha256(body).digest()


def payload_digest(payload: bytes) -> str:
    """BLAKE3, by which ledger and statements name a payload."""
    return blake3.blake3(payload).hexdigest()


def update_statement(update: ModelUpdate, *, payload_digest: str) -> bytes:
    """What a party signs of its update: all that the ledger keeps."""
    noise = update.privacy
    return canonical(
        statement_facts(
            federation=update.federation,
            ledger=update.ledger,
            party=update.party,
            update_id=update.update_id,
            sequence=update.sequence,
            base_version=update.base_version,
            base_digest=update.base_digest,
            manifest=update.manifest_digest,
            codec=update.codec,
            num_samples=update.num_samples,
            num_steps=update.num_steps,
            train_loss=update.train_loss,
            noise_multiplier=None if noise is None else noise.noise_multiplier,
            sample_rate=None if noise is None else noise.sample_rate,
            payload_digest=payload_digest,
        )
    )


def statement_facts(
    *,
    federation: str,
    ledger: LedgerId | None,
    party: str,
    update_id: str,
    sequence: int,
    base_version: int,
    base_digest: str,
    manifest: str,
    codec: str,
    num_samples: int,
    num_steps: int,
    train_loss: float | None,
    noise_multiplier: float | None,
    sample_rate: float | None,
    payload_digest: str,
) -> dict[str, object]:
    """By the names that the ledger's entries have, and its header: whoever holds an export can make the statement again."""
    return {
        "federation": federation,
        "ledger": ledger,
        "party": party,
        "update_id": update_id,
        "sequence": sequence,
        "base_version": base_version,
        "base_digest": base_digest,
        "manifest": manifest,
        "codec": codec,
        "num_samples": num_samples,
        "num_steps": num_steps,
        # No ledger keeps the sign of a zero.
        "train_loss": None if train_loss is None else train_loss + 0.0,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "payload_digest": payload_digest,
    }


def membership_statement(membership: Membership) -> bytes:
    return canonical(membership.model_dump(mode="json"))


def sign_membership(key: SigningKey, membership: Membership) -> SignedMembership:
    signature = key.sign("membership", membership_statement(membership))
    return SignedMembership(membership=membership, signature=signature)


def is_vouched_for(signed: SignedMembership, *, by: str) -> bool:
    return is_signed("membership", membership_statement(signed.membership), signed.signature, by=by)


def canonical(facts: dict[str, object]) -> bytes:
    given = {name: value for name, value in facts.items() if value is not None}
    return json.dumps(given, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _signed(kind: Kind, statement: bytes) -> bytes:
    return f"broker-fl/{kind}/1".encode() + b"\0" + statement
