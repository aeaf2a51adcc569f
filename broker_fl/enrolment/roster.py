"""What an operator says of parties: of one by flags, of many by a CSV file with one line each."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from broker_fl.config import TrustSettings
from broker_fl.errors import ConfigurationError, nearest
from schemas.ids import is_name
from schemas.membership import Membership

FACTS = ("display_name", "group", "num_samples", "tier", "public_key")
"""Fields of a membership that an operator says."""

COLUMNS = ("name", *FACTS)

_A_NAME = "lower-case letters, digits, - and _, at most 63 of them, the first a letter or a digit"
_EXPECTED = {
    "display_name": "at most 200 characters, in one line",
    "group": _A_NAME,
    "num_samples": "a whole number from 1",
    "tier": _A_NAME,
    "public_key": "an Ed25519 public key, 64 hexadecimal digits",
}


@dataclass(frozen=True, slots=True)
class PartyFacts:
    """`given` are fields of a membership; None takes one away, and one that is not there stays as it is."""

    name: str
    given: Mapping[str, object] = field(default_factory=dict)

    @property
    def public_key(self) -> str | None:
        key = self.given.get("public_key")
        return key if isinstance(key, str) else None


def party_facts(name: str, given: Mapping[str, object] | None = None, *, trust: TrustSettings | None = None) -> PartyFacts:
    """Raises ConfigurationError for what cannot be, and for a tier that `trust` does not know."""
    if not is_name(name):
        raise ConfigurationError(f"{name!r} cannot be a party: use {_A_NAME}")
    facts = dict(given or {})
    if isinstance(key := facts.get("public_key"), str):
        facts["public_key"] = key.lower()
    try:
        Membership.model_validate({"federation": "any", "party": name, "revision": 1, "at": 0.0, **facts})
    except ValidationError as exc:
        wrong = str(exc.errors(include_url=False, include_input=False)[0]["loc"][0])
        expected = _EXPECTED.get(wrong, f"one of {', '.join(FACTS)}")
        raise ConfigurationError(f"{wrong.replace('_', ' ')} {_shown(facts.get(wrong))}: expected {expected}") from None
    tiers = () if trust is None else trust.tiers
    if "tier" in facts and tiers and facts["tier"] not in tiers:
        raise ConfigurationError(f"tier {_shown(facts['tier'])}: {nearest(str(facts['tier']), tiers)} ([trust] tiers)")
    return PartyFacts(name, facts)


def read_roster(file: Path, *, trust: TrustSettings | None = None) -> list[PartyFacts]:
    """Of a CSV file with the columns `COLUMNS`, in any order, of which only `name` has to be there. An empty cell says nothing.

    Raises ConfigurationError with the number of the line; either all lines are right or none counts.
    """
    roster: list[PartyFacts] = []
    lines: dict[str, int] = {}
    mistakes: list[str] = []
    for line, row in _rows(file):
        try:
            facts = _facts_of(row, trust=trust)
            if facts.name in lines:
                raise ConfigurationError(f"party {facts.name!r} is in line {lines[facts.name]} already")
        except ConfigurationError as exc:
            mistakes.append(f"line {line}: {exc}")
            continue
        lines[facts.name] = line
        roster.append(facts)
    if mistakes:
        more = f"; and {len(mistakes) - 1} more wrong lines" if len(mistakes) > 1 else ""
        raise ConfigurationError(f"{file}, {mistakes[0]}{more}")
    if not roster:
        raise ConfigurationError(f"{file} names no party: expected a line for each below the names of the columns")
    return roster


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """With the line that each ends in; cells that say something, by their column."""
    try:
        # As spreadsheets write it: with a mark of the byte order.
        with file.open(encoding="utf-8-sig", newline="") as source:
            reader = csv.reader(source, strict=True)
            columns: list[str] | None = None
            for cells in reader:
                texts = [cell.strip() for cell in cells]
                if not any(texts):
                    continue
                if columns is None:
                    columns = _columns(file, texts)
                elif len(texts) != len(columns):
                    raise ConfigurationError(f"{file}, line {reader.line_num}: {len(texts)} cells for {len(columns)} columns")
                else:
                    yield reader.line_num, {column: text for column, text in zip(columns, texts, strict=True) if text}
    except csv.Error as exc:
        raise ConfigurationError(f"{file}, line {reader.line_num}: no CSV ({exc})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{file} is not UTF-8 (byte {exc.start}): save it so") from exc
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be read: {exc.strerror}") from exc


def _columns(file: Path, texts: list[str]) -> list[str]:
    columns = [text.lower().replace(" ", "_") for text in texts]
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        raise ConfigurationError(f"{file}: its cells are not separated by commas")
    for column, text in zip(columns, texts, strict=True):
        if column not in COLUMNS:
            raise ConfigurationError(f"{file}: unknown column {_shown(text)}: {nearest(column, COLUMNS)}")
        if columns.count(column) > 1:
            raise ConfigurationError(f"{file}: two columns are called {column!r}")
    if "name" not in columns:
        raise ConfigurationError(f"{file}: no column is called 'name'; the first line holds the names of the columns")
    return columns


def _facts_of(row: Mapping[str, str], *, trust: TrustSettings | None) -> PartyFacts:
    if "name" not in row:
        raise ConfigurationError("there is no name")
    given: dict[str, object] = {column: text for column, text in row.items() if column != "name"}
    if (samples := row.get("num_samples")) is not None and samples.isascii() and samples.isdigit() and len(samples) < 16:
        given["num_samples"] = int(samples)
    return party_facts(row["name"], given, trust=trust)


def names_of(names: Iterable[str], *, most: int = 5) -> str:
    """For a message: the first few, and how many there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
