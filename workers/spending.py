"""What training on a party's data has cost, for ever: a database of its own, which outlives outboxes and federations.

All workers that use the same data name the same file. It is attached to a worker's outbox, so that an update and what it cost
are one transaction; see `broker_fl.database.attach`.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import Column, Connection, Float, Integer, MetaData, String, Table, func, insert, inspect, select

from broker_fl.database import attach, attached_for_reading, reading, writing_alone
from broker_fl.errors import ConfigurationError, DamagedError
from broker_fl.privacy.accounting import History, Steps, composed
from broker_fl.privacy.record import Promise, Training

FORMAT = "1"

_TABLES = MetaData(schema="privacy")
_FACTS = Table("facts", _TABLES, Column("key", String, primary_key=True), Column("value", String, nullable=False))
_TRAININGS = Table(
    "trainings",
    _TABLES,
    Column("number", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("federation", String, nullable=False),
    Column("party", String, nullable=False),
    Column("outbox", String, nullable=False),
    Column("ledger", String, nullable=False),
    Column("base_version", Integer, nullable=False),
    Column("update_id", String, unique=True),  # none where training diverged and nothing was sent
    Column("noise_multiplier", Float, nullable=False),
    Column("sample_rate", Float, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("max_grad_norm", Float, nullable=False),
    Column("num_examples", Integer, nullable=False),
)
_PROMISES = Table(
    "promises",
    _TABLES,
    Column("number", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("federation", String, nullable=False),
    Column("party", String, nullable=False),
    Column("limits", String, nullable=False),
    Column("plan", String, nullable=False),
)


class Spending:
    """On the connection of an outbox, or alone in `open_spending`; one thread at a time."""

    def __init__(self, connection: Connection, file: Path) -> None:
        self._connection = connection
        self.name = str(file)

    @classmethod
    def attached(cls, connection: Connection, name: str, file: Path) -> "Spending":
        """Raises DamagedError, StorageError, and ConfigurationError for a file that another version of this program made."""
        attach(connection, name, file, _TABLES)
        spending = cls(connection, file)
        with writing_alone(connection, str(file)):
            spending._begin()
        return spending

    def _begin(self) -> None:
        facts = self._facts()
        if not facts:
            self._connection.execute(
                insert(_FACTS), [{"key": "format", "value": FORMAT}, {"key": "id", "value": uuid.uuid4().hex}]
            )
        else:
            self.expect_format()

    def expect_format(self) -> None:
        """Raises ConfigurationError."""
        with self._reading():
            found = self._facts().get("format")
        if found != FORMAT:
            raise ConfigurationError(
                f"{self.name} is of format {found!r}, and this version reads {FORMAT!r}: keep it, and use the version of "
                "broker-fl that wrote it"
            )

    def _facts(self) -> dict[str, str]:
        return {row.key: row.value for row in self._connection.execute(select(_FACTS))}

    @property
    def id(self) -> str:
        """Of this database: another one has another."""
        with self._reading():
            return self._facts()["id"]

    def add(self, training: Training) -> None:
        self._connection.execute(insert(_TRAININGS), asdict(training))

    def count(self, *, outbox: str | None = None) -> int:
        query = select(func.count()).select_from(_TRAININGS)
        if outbox is not None:
            query = query.where(_TRAININGS.c.outbox == outbox)
        with self._reading():
            return int(self._connection.execute(query).scalar_one())

    def history(self, *, federation: str | None = None) -> History:
        """Of all federations, or of one."""
        kind = (_TRAININGS.c.noise_multiplier, _TRAININGS.c.sample_rate)
        query = select(*kind, func.sum(_TRAININGS.c.steps)).group_by(*kind).order_by(func.min(_TRAININGS.c.number))
        if federation is not None:
            query = query.where(_TRAININGS.c.federation == federation)
        with self._reading():
            return composed(Steps(noise, rate, int(steps)) for noise, rate, steps in self._connection.execute(query))

    def trainings(self) -> list[Training]:
        """In order."""
        with self._reading():
            rows = self._connection.execute(select(_TRAININGS).order_by(_TRAININGS.c.number)).mappings().all()
        return [Training(**row) for row in rows]

    def promise(self, promise: Promise) -> None:
        """Kept where it differs from the last one of this federation and party."""
        kept = [one for one in self.promises() if (one.federation, one.party) == (promise.federation, promise.party)]
        if not kept or (kept[-1].limits, kept[-1].plan) != (promise.limits, promise.plan):
            self._connection.execute(insert(_PROMISES), asdict(promise))

    def promises(self) -> Sequence[Promise]:
        columns = [column for column in _PROMISES.c if column.name != "number"]
        with self._reading():
            return [Promise(*row) for row in self._connection.execute(select(*columns).order_by(_PROMISES.c.number))]

    def expect_whole(self, known: str | None, *, outbox: str) -> None:
        """`known` is what the outbox noted by `mark`. Raises DamagedError if the database lacks trainings that it knew of."""
        if known is None:
            return
        database, _, count = known.partition("/")
        found = self.count(outbox=outbox)
        if database != self.id or found < int(count):
            raise DamagedError(
                f"{self.name} is not the privacy record that this worker wrote to, or an older copy of it: it knows of "
                f"{found} of {count} trainings. Restore the newest one; without it nobody knows what was spent"
            )

    def mark(self, *, outbox: str) -> str:
        return f"{self.id}/{self.count(outbox=outbox)}"

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._connection, self.name)


@contextmanager
def open_spending(file: Path) -> Iterator[Spending]:
    """To read, while workers run or after. Raises ConfigurationError where there is none, StorageError."""
    if not file.exists():
        raise ConfigurationError(f"there is no privacy record {file}: no training with differential privacy was kept there")
    with attached_for_reading(file, _TABLES) as connection:
        spending = Spending(connection, file)
        with reading(connection, str(file)):
            is_one = inspect(connection).has_table(_FACTS.name, schema=_TABLES.schema)
        if not is_one:
            raise ConfigurationError(f"{file} is no privacy record: name the file that [privacy] record names, or leave it out")
        spending.expect_format()
        yield spending


def spending_file(folder: Path, party: str, record: Path | None = None) -> Path:
    """The record that was named, or where nothing is said one of this party's data, in its worker's state folder."""
    return record or folder / f"privacy-{party}.db"
