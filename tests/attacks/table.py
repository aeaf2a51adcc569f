"""The table of docs/security.md: what is tried, what should become of it and what became of it, and what denies it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from attacks import GROUPS
from battlefield import Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
HEADINGS = ("attack", "expected", "observed", "denied by", "honest pace")


def markdown(rows: Sequence[Row]) -> str:
    """One table for each group."""
    observed = {row.attack: row for row in rows}
    lines: list[str] = []
    for group in GROUPS:
        lines += ["", f"### {group.name}", "", _line(*HEADINGS), "|" + "---|" * len(HEADINGS)]
        for attack in group.attacks:
            row = observed[attack.name]
            pace = "" if row.pace is None else str(row.pace)
            lines.append(_line(attack.name, attack.expected_text, row.observed, attack.rule, pace))
    return "\n".join(lines[1:]) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def documented() -> Iterator[tuple[str, str, str, str]]:
    """Group, attack, expectation and rule of each row that the document has."""
    group, in_table = "", False
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            group, in_table = line.lstrip("# "), False
        elif line == _line(*HEADINGS):
            in_table = True
        elif in_table and line.startswith("| "):
            name, expected, _, rule, _ = line.removeprefix("| ").removesuffix(" |").split(" | ")
            yield group, name, expected, rule
