"""What the documents name is there: commands with their options, settings, pictures, other documents and their headings."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from broker_fl.cli.main import app
from broker_fl.config import SECTIONS

ROOT = Path(__file__).parents[2]
CONSOLE = ROOT / "docs" / "console"
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

MOST_BYTES = 150_000
BLOCKS = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def text_of(document):
    return document.read_text(encoding="utf-8")


def commands_of(text):
    """Words after `broker-fl`: of lines in code blocks, whole; and of code in the text, which may leave arguments out."""
    for block in BLOCKS.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("broker-fl ") else []
            if words:
                yield words[1:], True
    for span in re.findall(r"`broker-fl ([^`]+)`", BLOCKS.sub("", text)):
        yield shlex.split(" ".join(span.split())), False


def complaint(words, *, is_whole):
    """What the command line would say before it does anything; None where it would begin."""
    command = typer.main.get_command(app)
    context = command.context_class(command)
    while hasattr(command, "commands"):
        if words[:1] == ["--help"]:
            return None
        if not words or words[0] not in command.commands:
            return f"no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command, parent=context)
    flags = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in flags]
    if unknown or not is_whole:
        return f"no option {unknown}" if unknown else None
    try:
        command.make_context("broker-fl", list(words), parent=context)
    except Exception as exc:  # noqa: BLE001 (UsageError is click's, or that of the copy that newer typers bring along)
        return str(exc)
    return None


@by_name
def test_commands_are_there_with_their_options_and_arguments(document):
    found = list(commands_of(text_of(document)))
    wrong = {" ".join(words): said for words, is_whole in found if (said := complaint(words, is_whole=is_whole))}
    assert wrong == {}


def test_mistyped_commands_are_found():
    assert complaint(["party", "ad", "a"], is_whole=True)
    assert complaint(["party", "add", "a", "--gruop", "north"], is_whole=True)
    assert complaint(["party", "suspend"], is_whole=True)
    assert complaint(["party", "suspend"], is_whole=False) is None
    assert complaint(["party", "suspend", "a", "b"], is_whole=True)
    assert complaint(["ledger", "compact", "--keep", "many"], is_whole=True)
    text = "Say `broker-fl party\nlist`, then\n\n```\nbroker-fl status   # all\nls\nbroker-fl party add \\\n    a\n```\n"
    assert list(commands_of(text)) == [(["status"], True), (["party", "add", "a"], True), (["party", "list"], False)]


def test_settings_that_operations_names_are_there():
    named = re.findall(r"`\[(\w+)\] (\w+)", OPERATIONS)
    assert len(named) > 10
    assert [(section, key) for section, key in named if key not in SECTIONS[section].model_fields] == []


@pytest.mark.parametrize(
    "said",
    [
        "does not open this vhost",
        "refuses the login",
        "party suspended",
        "ledger lost, trying again",
        "policies were not checked",
        "not signed by the federation's key",
        "another worker already serves party",
    ],
)
def test_what_operations_quotes_is_said(said):
    assert f"`{said}`" in OPERATIONS or f"`is {said}`" in OPERATIONS
    sources = [file for package in ("aggregator", "broker_fl", "workers") for file in (ROOT / package).rglob("*.py")]
    assert any(said in text_of(file) for file in sources)


def test_pictures_are_there_small_and_all_of_them_shown():
    shown = re.findall(r"^!\[[^\]]+\]\(console/([a-z-]+\.png)\)$", OPERATIONS, re.MULTILINE)
    assert len(shown) >= 10
    assert sorted(shown) == sorted(file.name for file in CONSOLE.iterdir())
    assert {name: size for name in shown if (size := (CONSOLE / name).stat().st_size) > MOST_BYTES} == {}
    taken = re.findall(r'Picture\("([a-z-]+)"', text_of(ROOT / "docs" / "screenshots" / "__main__.py"))
    assert sorted(shown) == sorted(f"{name}.png" for name in taken)


def anchors_of(document):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCKS.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", BLOCKS.sub("", text_of(document))):
        linked = (document.parent / target).resolve() if target else document
        assert linked.exists(), f"{document.name} links {target}"
        assert not anchor or anchor in anchors_of(linked), f"{document.name} links {target}#{anchor}"
