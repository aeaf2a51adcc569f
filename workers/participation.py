"""Who trains from a frame: drawn by a hash that everyone can recompute, so that nobody has to be asked."""

import hashlib


def is_selected(*, federation: str, party: str, version: int, number: int, fraction: float) -> bool:
    """Whether SHA-256 of "federation/party/version/number", read as a number in [0, 1), lies below the fraction.

    The frame's number is part of it, so that a version which is broadcast again draws again.
    """
    drawn = hashlib.sha256(f"{federation}/{party}/{version}/{number}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < fraction * 2**64
