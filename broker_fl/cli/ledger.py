"""`broker-fl ledger`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from broker_fl.cli import options

app = typer.Typer(help="Look into the aggregator's ledger, and keep it small.", no_args_is_help=True)


@app.command("verify")
def verify(
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    party_keys: Annotated[
        Path | None,
        typer.Option(
            help="Public keys that you had from the parties themselves, lines of NAME KEY, with those that were given up: "
            "neither the broker nor the aggregator has to be believed then.",
            show_default=False,
        ),
    ] = None,
    sets: options.Sets = None,
) -> None:
    """Check the hash chain and the parties' signatures, make every version again from the first snapshot, and compare all of it,
    to the last bit."""
    from aggregator.verification import verify as verify_ledger
    from broker_fl.cli.stores import stores_for_reading

    keys = None if party_keys is None else _read_party_keys(party_keys)
    with stores_for_reading(options.load_stores(config, state, ledger, sets)) as (found, snapshots):
        verified = verify_ledger(found, snapshots, party_keys=keys)
        name = found.name
    counts = f"{verified.merged} merged, {verified.buffered} buffered, {verified.refused} refused"
    typer.echo(
        f"{name}: {verified.entries} entries ({counts}), {verified.frames} frames, {verified.snapshots} snapshots: "
        "all as recorded"
    )
    if verified.replayed_from:
        typer.echo(f"replayed from version {verified.replayed_from}: what came before was compacted, and is in the chain only")
    by = "keys that the federation vouches for" if keys is None else f"the keys in {party_keys}"
    typer.echo(f"{verified.signed} updates are signed by their parties, by {by}; {verified.unsigned} are unsigned")
    typer.echo(f"chain {verified.chain}")
    typer.echo(f"version {verified.version} is {verified.model_digest}")


def _read_party_keys(file: Path) -> dict[str, list[str]]:
    """By party. Raises ConfigurationError, naming the line."""
    from broker_fl.errors import ConfigurationError
    from schemas.ids import is_name, is_public_key

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{file} cannot be read: {exc}") from exc
    keys: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not is_name(words[0]) or not is_public_key(words[1]):
            raise ConfigurationError(f"{file}, line {number}: expected a party's name and its key of 64 hexadecimal digits")
        keys.setdefault(words[0], []).append(words[1])
    return keys


@app.command("export")
def export(
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    out: Annotated[Path | None, typer.Option(help="The file; standard output without.", show_default=False)] = None,
    sets: options.Sets = None,
) -> None:
    """Write the ledger as JSON Lines: what it is of, then each entry with its place in the hash chain, without payloads."""
    from aggregator.export import lines
    from broker_fl.cli.stores import stores_for_reading
    from broker_fl.errors import ConfigurationError

    with stores_for_reading(options.load_stores(config, state, ledger, sets)) as (found, _):
        if out is None:
            sys.stdout.writelines(f"{line}\n" for line in lines(found))
            return
        try:
            with out.open("x", encoding="utf-8") as sink:
                try:
                    sink.writelines(f"{line}\n" for line in lines(found))
                except BaseException:
                    out.unlink()  # Half an export would be taken for a whole one.
                    raise
        except FileExistsError as exc:
            raise ConfigurationError(f"{out} exists already: move it away first") from exc
        except OSError as exc:
            raise ConfigurationError(f"{out} cannot be written: {exc}") from exc
    typer.echo(f"wrote {out}")


@app.command("compact")
def compact(
    keep: Annotated[int, typer.Option(min=0, help="Keep the payloads of so many of the newest entries.")],
    config: options.Config = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    sets: options.Sets = None,
) -> None:
    """Drop old payloads, frames and snapshots; every entry stays, and the chain whole. The aggregator may be at work."""
    from aggregator.compaction import compact as compact_ledger
    from broker_fl.cli.stores import stores_for_writing

    with stores_for_writing(options.load_stores(config, state, ledger, sets)) as (found, snapshots):
        done = compact_ledger(found, snapshots, keep=keep)
        name = found.name
    typer.echo(
        f"{name}: dropped {done.payloads} payloads ({done.payload_bytes:,} bytes), {done.frames} frames and {done.snapshots} "
        f"snapshots; versions from {done.replays_from} on can still be made again"
    )
    if not done.room_is_back:
        typer.echo("an aggregator is writing: the file keeps its size, with room for new entries; run this again when it rests")
