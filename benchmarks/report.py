"""How every benchmark ends: rows on the screen, and in a file where asked for."""

import argparse
import json
import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write the rows here")
    return arguments


def cores() -> int:
    return os.cpu_count() or 1


def machine() -> str:
    return f"{cores()} cores, {platform.machine()}, Python {platform.python_version()}"


def show(title: str, rows: Sequence[Any], *, json_file: Path | None, hidden: Collection[str] = ()) -> None:
    """`rows` are dataclasses of one kind; fields that are `hidden` are in the file only."""
    records = [asdict(row) for row in rows]
    table = Table(title=f"{title} ({machine()})", title_justify="left")
    shown = [name for name in records[0] if name not in hidden]
    for name in shown:
        is_text = any(isinstance(record[name], str) for record in records)
        table.add_column(name.replace("_", " "), justify="right", no_wrap=is_text)  # Words, so that long headings break.
    for record in records:
        table.add_row(*(_text(record[name]) for name in shown))
    Console(width=160).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "rows": records}, indent=2) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)
