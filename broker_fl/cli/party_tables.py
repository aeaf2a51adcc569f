"""How parties are shown: for people in tables, for programs as JSON."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from broker_fl.enrolment import Listed, Office, Seen, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from schemas.membership import Membership


def listed_facts(one: Listed) -> dict[str, object]:
    return {"name": one.name, "state": one.state, **_member_facts(one.membership)}


def seen_facts(seen: Seen, office: Office) -> dict[str, object]:
    rights = seen.permissions
    return {
        "name": seen.name,
        "state": seen.state,
        **_member_facts(seen.membership),
        "federation": office.federation,
        "federation_key": office.public_key,
        "login": seen.login,
        "limits": seen.limits,
        "permissions": None if rights is None else {"configure": rights.configure, "write": rights.write, "read": rights.read},
        "elsewhere": list(seen.elsewhere),
        "connections": [
            {"name": one.name, "peer": one.peer, "since": None if one.since is None else one.since.isoformat()}
            for one in seen.connections
        ],
        "inbox": seen.inbox,
    }


def parties_table(members: "Iterable[Listed]") -> Table:
    table = Table("name", "display name", "group", "tier", "state")
    table.add_column("samples", justify="right")
    for one in members:
        member = one.membership
        facts = ("", "", "", "") if member is None else _columns(member)
        display_name, group, tier, samples = facts
        # Not by markup: names are what somebody wrote.
        table.add_row(one.name, Text(display_name), group, tier, one.state, samples)
    return table


def party_table(seen: Seen, office: Office) -> Table:
    table = Table(show_header=False, title=f"{seen.name} of {office.federation}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, text in _lines(seen, office):
        table.add_row(what, Text(text))
    return table


def _lines(seen: Seen, office: Office) -> "Iterable[tuple[str, str]]":
    member = seen.membership
    yield "state", seen.state
    if member is not None:
        display_name, group, tier, samples = _columns(member)
        yield from (("display name", display_name), ("group", group), ("tier", tier), ("samples", samples))
        if member.suspended:
            yield "suspended for", member.reason
        yield "changed", f"{datetime.fromtimestamp(member.at, UTC):%Y-%m-%d %H:%M:%S} UTC"
        yield "key", "none" if member.public_key is None else fingerprint(member.public_key)
    yield "login", seen.login
    yield "limits", ", ".join(f"{limit} {value}" for limit, value in sorted(seen.limits.items())) or "none"
    if seen.permissions is not None:
        rights = seen.permissions
        yield from (("may configure", rights.configure), ("may write", rights.write), ("may read", rights.read))
    if seen.elsewhere:
        yield "rights elsewhere", ", ".join(seen.elsewhere)
    yield "inbox", "none" if seen.inbox is None else f"{seen.inbox} receipts"
    for one in seen.connections:
        since = "" if one.since is None else f" since {one.since:%Y-%m-%d %H:%M:%S} UTC"
        yield "connection", f"{one.name} from {one.peer}{since}"
    yield "federation's key", office.public_key or "not here"


def _columns(member: "Membership") -> tuple[str, str, str, str]:
    samples = "" if member.num_samples is None else f"{member.num_samples:,}"
    return member.display_name, member.group or "", member.tier, samples


def _member_facts(member: "Membership | None") -> dict[str, object]:
    if member is None:
        return {}
    facts = member.model_dump(mode="json", exclude={"schema_version", "federation", "party"})
    return {**facts, "fingerprint": None if member.public_key is None else fingerprint(member.public_key)}
