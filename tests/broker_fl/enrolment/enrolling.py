"""An office that enrols in a vhost of its own, and writes the parties' files into a folder."""

import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from broker_fl.config import Settings, load_settings
from broker_fl.enrolment import (
    Office,
    Outcome,
    PartyFacts,
    PartyFiles,
    add_parties,
    list_members,
    party_facts,
    remove_party,
    rotate_party,
)
from broker_fl.errors import NotFoundError
from schemas.membership import Membership

AddUser = Callable[..., Awaitable[str]]

OPERATOR_PASSWORD = "correct-horse"


@dataclass(frozen=True, slots=True)
class Site:
    office: Office
    folder: Path

    @property
    def files(self) -> PartyFiles:
        return PartyFiles(self.office.settings, aggregator_key=self.office.public_key, file_of=self.file)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.toml"

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.toml.part"

    def party(self, name: str) -> Settings:
        """What the party's worker reads."""
        return load_settings(self.file(name), environment={})

    async def add(self, name: str, **given: object) -> Outcome:
        return (await self.add_all([party_facts(name, given)]))[name]

    async def add_all(self, roster: list[PartyFacts]) -> dict[str, Outcome]:
        return await add_parties(self.office, roster, self.files)

    async def rotate(self, name: str, **given: object) -> None:
        await rotate_party(self.office, party_facts(name, given), self.files)

    async def member(self, name: str) -> Membership | None:
        signed, _ = await self.office.shelf.one(name)
        return None if signed is None else signed.membership

    def of(self, federation: str) -> "Site":
        """Another federation in the same vhost, with the same key."""
        settings = self.office.settings.model_copy(
            update={"federation": self.office.settings.federation.model_copy(update={"name": federation})}
        )
        folder = self.folder / federation
        folder.mkdir()
        return Site(replace(self.office, settings=settings), folder)

    async def empty(self) -> None:
        members, planted = await list_members(self.office)
        for name in {*(one.name for one in members), *planted}:
            await remove_party(self.office, name)
        with suppress(NotFoundError):
            await self.office.management.delete_global_parameter(self.office.shelf.key_name)


def settings_of(url: str, management_url: str, folder: Path, **sections: dict[str, object]) -> Settings:
    flags = {
        "federation": {"name": "digits"},
        "broker": {"url": url, "management_url": management_url},
        "aggregator": {"state": str(folder / "state")},
        **sections,
    }
    return load_settings(flags=flags, environment={})


def new_name(prefix: str = "party") -> str:
    """Users belong to the whole node, which all tests share."""
    return f"{prefix}-{secrets.token_hex(4)}"
