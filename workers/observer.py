"""What a worker tells whoever counts: facts that are there already. Nobody has to listen."""

from typing import Protocol

from schemas.receipt import Receipt


class Observer(Protocol):
    """Called on the event loop and in the outbox's thread: it returns at once."""

    def connected(self, is_connected: bool) -> None:
        """To the broker, with the inbox of the party for itself."""

    def has_version(self, version: int) -> None:
        """The model that is held."""

    def read(self, codec: str, size: int) -> None:
        """Bytes of a broadcast, or of a part of one."""

    def trained(self, seconds: float) -> None: ...

    def sent(self, codec: str, size: int) -> None:
        """An update of so many bytes, which the broker confirmed; one that is sent again is told again."""

    def settled(self, receipt: Receipt) -> None: ...

    def has_unsettled(self, updates: int) -> None:
        """That wait in the outbox."""

    def has_spent(self, epsilon: float) -> None:
        """On the party's data, all federations together."""


class Unobserved:
    """Nobody counts."""

    def connected(self, is_connected: bool) -> None:
        pass

    def has_version(self, version: int) -> None:
        pass

    def read(self, codec: str, size: int) -> None:
        pass

    def trained(self, seconds: float) -> None:
        pass

    def sent(self, codec: str, size: int) -> None:
        pass

    def settled(self, receipt: Receipt) -> None:
        pass

    def has_unsettled(self, updates: int) -> None:
        pass

    def has_spent(self, epsilon: float) -> None:
        pass
