"""`broker-fl party`."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from broker_fl.config import Settings
    from broker_fl.enrolment import Issue, Office, Outcome, PartyFacts, PartyFiles

app = typer.Typer(
    help="Enrol parties on the broker, through RabbitMQ's management API; [broker] url or management_url needs the login of an "
    "administrator, and changes need the federation's private key.",
    no_args_is_help=True,
)

Name = Annotated[
    str, typer.Argument(help="Lower-case letters, digits, - and _; it becomes the party's login.", show_default=False)
]
DisplayName = Annotated[str | None, typer.Option(help="What people call it.", show_default=False)]
Group = Annotated[str | None, typer.Option(help='Its group: a name like a party\'s; "" for none.', show_default=False)]
NumSamples = Annotated[
    int | None, typer.Option(help="Of its data, as agreed: updates that say more are refused.", show_default=False)
]
Tier = Annotated[str | None, typer.Option(help="How far it is trusted: one of [trust] tiers.", show_default=False)]
PublicKey = Annotated[
    str | None,
    typer.Option(help="Of a party that made its own key and keeps the private one: 64 hexadecimal digits.", show_default=False),
]
ByCertificate = Annotated[
    bool, typer.Option("--certificate", help="It logs in by a certificate, issued here, in place of a password.")
]
External = Annotated[bool, typer.Option("--external", help="It logs in by a certificate of its own, with its name in it.")]
Certs = Annotated[Path, typer.Option("--certs", help="Folder of the authority that issues certificates: see `broker-fl certs`.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command("add")
def add(
    name: Annotated[
        str | None,
        typer.Argument(help="Lower-case letters, digits, - and _; it becomes the party's login.", show_default=False),
    ] = None,
    config: options.Config = None,
    broker: options.Broker = None,
    roster: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Many at once: a CSV file with the columns name, display_name, group, num_samples, tier and public_key, where "
            "only name has to be there.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write NAME.toml: a folder, or a file *.toml; without it, here.", show_default=False),
    ] = None,
    display_name: DisplayName = None,
    group: Group = None,
    num_samples: NumSamples = None,
    tier: Tier = None,
    public_key: PublicKey = None,
    certificate: ByCertificate = False,
    external: External = False,
    certs: Certs = Path("certs"),
    sets: options.Sets = None,
) -> None:
    """Make a party, and write the file that its worker reads. It holds its password and key: hand it over safely.

    Done again, it goes on where it was interrupted, and changes what was said anew of a party that is there.
    """
    settings = _load(config, broker, sets)
    given = _given(display_name, group, num_samples, tier, public_key)
    if roster is not None:
        if name is not None or given:
            raise typer.BadParameter("goes without a name and without facts: they are in the file", param_hint="--from")
        _added_all(settings, roster, out or Path(), issue=_issuer(settings, certificate, external, certs))
    elif name is not None:
        from broker_fl.enrolment import party_facts

        facts = party_facts(name, given, trust=settings.trust)
        file = _file(out, name)
        _added_one(settings, facts, file, issue=_issuer(settings, certificate, external, certs))
    else:
        raise typer.BadParameter("name a party, or give a file of many by --from", param_hint="NAME")


@app.command("list")
def list_all(
    config: options.Config = None,
    broker: options.Broker = None,
    group: Annotated[str | None, typer.Option(help="Only those of this group.", show_default=False)] = None,
    as_json: Json = False,
    sets: options.Sets = None,
) -> None:
    """Show all parties in a table; where the output is no terminal, their names, one a line."""
    asyncio.run(_list(_load(config, broker, sets), group, as_json=as_json))


@app.command("show")
def show(
    name: Name,
    config: options.Config = None,
    broker: options.Broker = None,
    as_json: Json = False,
    sets: options.Sets = None,
) -> None:
    """Show all that is known of a party: facts, limits, rights, connections, inbox, fingerprint of its key. No secrets."""
    asyncio.run(_show(_load(config, broker, sets), name, as_json=as_json))


@app.command("rotate")
def rotate(
    name: Name,
    config: options.Config = None,
    broker: options.Broker = None,
    out: Annotated[Path | None, typer.Option(help="Where its file is, as with `add`.", show_default=False)] = None,
    public_key: PublicKey = None,
    certificate: ByCertificate = False,
    external: External = False,
    certs: Certs = Path("certs"),
    sets: options.Sets = None,
) -> None:
    """Give a party a new password (or certificate) and a new key. The old ones end at once, and its connections; its file is
    replaced."""
    from broker_fl.enrolment import party_facts

    settings = _load(config, broker, sets)
    facts = party_facts(name, _given(public_key=public_key))
    file = _file(out, name)
    asyncio.run(_rotate(settings, facts, file, issue=_issuer(settings, certificate, external, certs, revokes=True)))
    typer.echo(f"party {name} has new credentials, in {file}; the old ones are no good any more")


@app.command("suspend")
def suspend(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why; it is told to the party.")] = "",
    config: options.Config = None,
    broker: options.Broker = None,
    sets: options.Sets = None,
) -> None:
    """Shut a party out for a while: its connections are closed, it may not log in, and what it sent before is refused."""
    count = asyncio.run(_suspend(_load(config, broker, sets), name, reason))
    typer.echo(f"party {name} is suspended; it had {count} connections")


@app.command("resume")
def resume(name: Name, config: options.Config = None, broker: options.Broker = None, sets: options.Sets = None) -> None:
    """Let a suspended party in again, with the password and key that it has."""
    asyncio.run(_resume(_load(config, broker, sets), name))
    typer.echo(f"party {name} may log in")


@app.command("set")
def set_facts(
    name: Name,
    config: options.Config = None,
    broker: options.Broker = None,
    display_name: DisplayName = None,
    group: Group = None,
    num_samples: NumSamples = None,
    tier: Tier = None,
    public_key: PublicKey = None,
    sets: options.Sets = None,
) -> None:
    """Change what is written down about a party."""
    from broker_fl.enrolment import party_facts

    settings = _load(config, broker, sets)
    given = _given(display_name, group, num_samples, tier, public_key)
    if not given:
        raise typer.BadParameter("say what to change: --display-name, --group, --num-samples, --tier or --public-key")
    asyncio.run(_set(settings, party_facts(name, given, trust=settings.trust)))
    typer.echo(f"party {name} is changed")


@app.command("remove")
def remove(
    name: Name,
    config: options.Config = None,
    broker: options.Broker = None,
    certs: Certs = Path("certs"),
    sets: options.Sets = None,
) -> None:
    """Take a party's login away, which closes its connections, and delete its exchange, its inbox and its entry in the register.
    A certificate that was issued here is revoked."""
    settings = _load(config, broker, sets)
    is_gone = asyncio.run(_remove(settings, name))
    typer.echo(f"party {name} is removed")
    if not is_gone:
        typer.echo(f"the user {name} stays, without rights in this virtual host: it has others on the broker", err=True)
    if (certs / "ca.pem").exists() and _revoked(certs, name):
        typer.echo(f"its certificate is revoked in {certs}")


@app.command("key")
def key(config: options.Config = None, sets: options.Sets = None) -> None:
    """Print the federation's public key, by which an evaluator on another machine checks frames ([security] aggregator_key).

    Where the federation has no key yet, the private one is made ([security] key).
    """
    from broker_fl.keys import load_or_make_key

    typer.echo(load_or_make_key(_load(config, None, sets).key_file).public)


def _load(config: Path | None, broker: str | None, sets: list[str] | None) -> "Settings":
    return options.load(config, options.flags_of({"broker.url": broker}, sets))


def _file(out: Path | None, name: str) -> Path:
    if out is not None and out.suffix == ".toml":
        return out
    from broker_fl.enrolment import make_folder_of_files

    folder = out or Path()
    make_folder_of_files(folder)
    return folder / f"{name}.toml"


def _given(
    display_name: str | None = None,
    group: str | None = None,
    num_samples: int | None = None,
    tier: str | None = None,
    public_key: str | None = None,
) -> dict[str, object]:
    """What was said, by the names of a membership."""
    facts = {
        "display_name": display_name,
        "group": group,
        "num_samples": num_samples,
        "tier": tier,
        "public_key": public_key,
    }
    return {key: None if (key, value) == ("group", "") else value for key, value in facts.items() if value is not None}


def _issuer(settings: "Settings", certificate: bool, external: bool, certs: Path, *, revokes: bool = False) -> "Issue | None":
    """Where certificates come from; None for a password. `revokes`: those that are out are worth nothing any more."""
    from broker_fl.errors import ConfigurationError

    if not (certificate or external):
        return None
    if certificate and external:
        raise typer.BadParameter("goes without --external: a party has one certificate", param_hint="--certificate")
    if not settings.broker.is_tls:
        raise ConfigurationError("a certificate needs TLS: [broker] url = amqps://HOST:5671/VHOST, as the parties reach it")
    if external:
        return lambda _: None
    from broker_fl.certificates import Certificates
    from broker_fl.enrolment import Certificate

    authority = Certificates.open(certs)

    def issue(name: str) -> Certificate:
        if revokes:
            _revoked(certs, name)
        issued = authority.issue(name)
        return Certificate(issued.certificate_pem, issued.key_pem)

    return issue


def _revoked(certs: Path, name: str) -> bool:
    """Whether there was a certificate to revoke."""
    from broker_fl.certificates import Certificates

    authority = Certificates.open(certs)
    return any(record.name == name for record in authority.records()) and bool(authority.revoke(name))


def _files(office: "Office", file_of: Callable[[str], Path]) -> "PartyFiles":
    from broker_fl.enrolment import PartyFiles

    return PartyFiles(office.settings, aggregator_key=office.signing_key().public, file_of=file_of)


def _added_one(settings: "Settings", facts: "PartyFacts", file: Path, *, issue: "Issue | None") -> None:
    name = facts.name
    outcome = asyncio.run(_add(settings, [facts], lambda _: file, issue=issue))[name]
    if outcome == "new":
        typer.echo(f"party {name} is enrolled. Its worker: broker-fl worker --enrolment {file} --data PATH")
        return
    typer.echo(f"party {name} is enrolled already: {'it has changed' if outcome == 'changed' else 'it stays as it is'}")
    if not file.exists():
        typer.echo(f"there is no {file}: `broker-fl party rotate {name}` writes one, with new credentials", err=True)


def _added_all(settings: "Settings", roster: Path, folder: Path, *, issue: "Issue | None") -> None:
    from broker_fl.enrolment import make_folder_of_files, names_of, read_roster

    parties = read_roster(roster, trust=settings.trust)
    make_folder_of_files(folder)
    outcomes = asyncio.run(_add(settings, parties, lambda name: folder / f"{name}.toml", issue=issue))
    counts = Counter(outcomes.values())
    typer.echo(
        f"{len(outcomes)} parties are enrolled: {counts['new']} new, {counts['changed']} changed, {counts['unchanged']} as they "
        f"were. Their files are in {folder}"
    )
    without = [name for name in outcomes if not (folder / f"{name}.toml").exists()]
    if without:
        typer.echo(
            f"{len(without)} have no file in {folder}: {names_of(without)}. `broker-fl party rotate NAME` writes one, with new "
            "credentials",
            err=True,
        )


async def _add(
    settings: "Settings", parties: "list[PartyFacts]", file_of: Callable[[str], Path], *, issue: "Issue | None"
) -> "dict[str, Outcome]":
    from rich.console import Console
    from rich.progress import Progress

    from broker_fl.enrolment import add_parties, open_office

    is_shown = len(parties) > 1 and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not is_shown) as progress:
        task = progress.add_task("parties", total=len(parties))
        async with open_office(settings) as office:
            return await add_parties(
                office,
                parties,
                _files(office, file_of),
                issue=issue,
                told=lambda done: progress.update(task, completed=done),
            )


async def _list(settings: "Settings", group: str | None, *, as_json: bool) -> None:
    from broker_fl.cli.party_tables import listed_facts, parties_table
    from broker_fl.enrolment import list_members, open_office

    async with open_office(settings, signs=False) as office:
        members, planted = await list_members(office)
    _warn(office, planted)
    if group is not None:
        members = [one for one in members if one.membership is not None and one.membership.group == group]
    if as_json:
        typer.echo(json.dumps([listed_facts(one) for one in members]))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(parties_table(members))
    elif members:
        typer.echo("\n".join(one.name for one in members))


async def _show(settings: "Settings", name: str, *, as_json: bool) -> None:
    from broker_fl.cli.party_tables import party_table, seen_facts
    from broker_fl.enrolment import open_office, see_party

    async with open_office(settings, signs=False) as office:
        seen = await see_party(office, name)
    _warn(office, [])
    if as_json:
        typer.echo(json.dumps(seen_facts(seen, office)))
    else:
        from rich.console import Console

        Console().print(party_table(seen, office))


def _warn(office: "Office", planted: list[str]) -> None:
    from broker_fl.enrolment import names_of

    if office.public_key is None:
        typer.echo("the register's signatures were not checked: the federation's key is not here ([security] key)", err=True)
    if planted:
        typer.echo(f"not signed by the federation's key, and of no account: the entries of {names_of(planted)}", err=True)


async def _rotate(settings: "Settings", facts: "PartyFacts", file: Path, *, issue: "Issue | None") -> None:
    from broker_fl.enrolment import open_office, rotate_party

    async with open_office(settings) as office:
        await rotate_party(office, facts, _files(office, lambda _: file), issue=issue)


async def _suspend(settings: "Settings", name: str, reason: str) -> int:
    from broker_fl.enrolment import open_office, suspend_party

    async with open_office(settings) as office:
        return await suspend_party(office, name, reason)


async def _resume(settings: "Settings", name: str) -> None:
    from broker_fl.enrolment import open_office, resume_party

    async with open_office(settings) as office:
        await resume_party(office, name)


async def _set(settings: "Settings", facts: "PartyFacts") -> None:
    from broker_fl.enrolment import change_party, open_office

    async with open_office(settings) as office:
        await change_party(office, facts)


async def _remove(settings: "Settings", name: str) -> bool:
    from broker_fl.enrolment import open_office, remove_party

    async with open_office(settings, signs=False) as office:
        return await remove_party(office, name)
