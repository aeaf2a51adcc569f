"""The federation's private key, in a file of its own: who has it, and nobody else, speaks for the aggregator."""

import os
import secrets
from pathlib import Path

from broker_fl.errors import ConfigurationError
from broker_fl.signing import SigningKey

MODE = 0o600


def load_or_make_key(file: Path) -> SigningKey:
    """Made where there is none, mode 0600, by whoever comes first. Raises ConfigurationError."""
    _make(file)
    return load_key(file)


def load_key(file: Path) -> SigningKey:
    """Raises ConfigurationError."""
    try:
        text = file.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError as exc:
        raise ConfigurationError(f"there is no {file}: name the federation's key by [security] key") from exc
    except OSError as exc:
        raise ConfigurationError(f"the federation's key {file} cannot be read: {exc}") from exc
    return key_of(text, what=str(file))


def key_of(text: str, *, what: str) -> SigningKey:
    """Raises ConfigurationError, which does not show the text."""
    try:
        return SigningKey.from_text(text)
    except ValueError:
        # Its message could show a part of the key.
        raise ConfigurationError(f"{what} holds no private key: expected 64 hexadecimal digits") from None


def _make(file: Path) -> None:
    """Whole or not at all, and never over another one: two may start at the same moment."""
    try:
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: one that was killed in the middle may have had the same process id, and so may a thread.
        partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.part")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as sink:
                sink.write(SigningKey.generate().text() + "\n")
                sink.flush()
                os.fsync(sink.fileno())
            os.link(partial, file)
        finally:
            partial.unlink()
    except FileExistsError:
        return
    except OSError as exc:
        raise ConfigurationError(f"the federation's key cannot be written to {file}: {exc}") from exc
