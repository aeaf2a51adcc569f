"""Names and numbers that identify things on the wire and on the broker."""

import re
from typing import Annotated

from pydantic import Field, StringConstraints

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
"""Parties and federations: lower case, no dots, since the names of exchanges and permissions are built from them."""

PartyId = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
FederationId = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
UpdateId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
LedgerId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hexadecimal."""
PUBLIC_KEY_PATTERN = r"^[0-9a-f]{64}$"
PublicKey = Annotated[str, StringConstraints(pattern=PUBLIC_KEY_PATTERN)]
"""Ed25519 (RFC 8032), in lower-case hexadecimal."""
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]

Version = Annotated[int, Field(ge=0, lt=2**53)]

SchemaVersion = Annotated[int, Field(ge=1, le=1)]
"""The only one so far. A Literal would take `true` and 1.0 for it too."""


def is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN, text) is not None


def is_public_key(text: str) -> bool:
    return re.fullmatch(PUBLIC_KEY_PATTERN, text) is not None
