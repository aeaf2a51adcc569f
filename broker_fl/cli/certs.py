"""`broker-fl certs`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from broker_fl.certificates import Certificates

app = typer.Typer(
    help="A private certificate authority for the broker and all who log in to it, in a folder; see docs/tls.md.",
    no_args_is_help=True,
)

_SOON_DAYS = 30

Folder = Annotated[Path, typer.Option("--folder", "-f", help="Of the authority.")]
Name = Annotated[
    str,
    typer.Argument(
        help="Of a party, or any other user of the broker; or of a server, for you to know it by.", show_default=False
    ),
]


@app.command("init")
def init(
    folder: Folder = Path("certs"),
    days: Annotated[int, typer.Option(min=1, help="How long the authority's own certificate is valid.")] = 3650,
) -> None:
    """Make an authority. Whoever has its key, ca-key.pem, can let anyone in: keep it off the broker's machine."""
    from broker_fl.certificates import Certificates

    if (folder / "ca.pem").exists():
        there = Certificates.open(folder)
        typer.echo(f"{folder} holds an authority already, valid until {there.expires:%Y-%m-%d}: nothing was changed")
        return
    made = Certificates.make(folder, days=days)
    typer.echo(f"made an authority in {folder}, valid until {made.expires:%Y-%m-%d}")
    typer.echo(f"keep {folder / 'ca-key.pem'} to yourself; {folder / 'ca.pem'} is for everyone")


@app.command("issue")
def issue(
    name: Name,
    folder: Folder = Path("certs"),
    server: Annotated[bool, typer.Option("--server", help="For a broker; without it, for who logs in as NAME.")] = False,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="Of a server: what clients call it, a name or an address. Repeatable; localhost and 127.0.0.1 by default.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long it is valid.")] = 365,
    renew: Annotated[
        bool, typer.Option("--renew", help="Although there is a valid one, which stays valid; a server's hosts stay the same.")
    ] = False,
) -> None:
    """Make a certificate and its key, NAME.pem and NAME.key in the folder. Earlier ones move to old/."""
    from broker_fl.certificates import Certificates

    if hosts and not server:
        raise typer.BadParameter("goes with --server: a client's certificate names a user, not a host", param_hint="--host")
    certificates = Certificates.open(folder)
    names = _hosts(certificates, name, hosts, renew=renew) if server else ()
    issued = certificates.issue(name, hosts=names, days=days, renew=renew)
    certificate, key = certificates.keep(issued)
    whom = f"the server {', '.join(names)}" if server else f"the user {name}"
    typer.echo(f"wrote {certificate} and {key} for {whom}, valid until {issued.expires:%Y-%m-%d}")


def _hosts(certificates: "Certificates", name: str, given: list[str] | None, *, renew: bool) -> tuple[str, ...]:
    before = [record.hosts for record in certificates.records() if record.name == name and record.hosts]
    if given is None and renew and before:
        return before[-1]
    return tuple(given or ("localhost", "127.0.0.1"))


@app.command("revoke")
def revoke(name: Name, folder: Folder = Path("certs")) -> None:
    """Put all certificates of NAME on the list of what is revoked. Who is connected stays so: `party suspend` ends that."""
    from broker_fl.certificates import Certificates

    certificates = Certificates.open(folder)
    revoked = certificates.revoke(name)
    what = f"revoked {len(revoked)} of {name}" if revoked else f"all of {name} were revoked before"
    typer.echo(f"{what}; the broker reads {certificates.revocations}, clients {folder / 'crl.pem'}: copy them to where those are")


@app.command("list")
def list_all(folder: Folder = Path("certs")) -> None:
    """Show what was issued, until when it is valid, and what is revoked."""
    from rich.console import Console
    from rich.table import Table

    from broker_fl.certificates import Certificates

    certificates, now = Certificates.open(folder), datetime.now(UTC)
    table = Table("name", "for", "valid until", "state", box=None, pad_edge=False)
    table.add_row("(authority)", "all", f"{certificates.expires:%Y-%m-%d}", _left(certificates.expires, now))
    for record in certificates.records():
        state = record.state(now)
        shown = _left(record.expires, now) if state == "valid" else state
        table.add_row(record.name, ", ".join(record.hosts) or "login", f"{record.expires:%Y-%m-%d}", shown)
    Console(highlight=False, markup=False).print(table)


def _left(expires: datetime, now: datetime) -> str:
    days = (expires - now).days
    if days < 0:
        return "expired"
    return "valid" if days >= _SOON_DAYS else f"valid, for {days} more days"
