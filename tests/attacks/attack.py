"""What an attack is: a name, what should become of it, which setting or rule says so, and a function that tries."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from battlefield import Battlefield

Try = Callable[[Battlefield], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    group: str
    expected: str
    """What is observed begins so; figures may follow."""
    rule: str
    run: Try
    on_rabbitmq_4: str = ""
    """What is expected there, where it differs."""
    is_long: bool = False
    """It goes on for seconds, and the pace of the honest is measured meanwhile."""

    def expected_on(self, field: Battlefield) -> str:
        return self.on_rabbitmq_4 if self.on_rabbitmq_4 and field.is_rabbitmq_4 else self.expected

    @property
    def expected_text(self) -> str:
        return f"{self.expected}; on RabbitMQ 4: {self.on_rabbitmq_4}" if self.on_rabbitmq_4 else self.expected


@dataclass(slots=True)
class Group:
    name: str
    attacks: list[Attack] = field(default_factory=list)

    def attack(
        self, name: str, *, expected: str, rule: str, on_rabbitmq_4: str = "", is_long: bool = False
    ) -> Callable[[Try], Try]:
        """A function that tries it, and gives what was observed."""

        def register(run: Try) -> Try:
            self.attacks.append(Attack(name, self.name, expected, rule, run, on_rabbitmq_4, is_long))
            return run

        return register
