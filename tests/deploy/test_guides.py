"""What the READMEs of deploy/ tell people to type exists."""

import re

import pytest
from deployment import DEPLOY, documents, parse_command, shell_blocks

GUIDES = {name: (DEPLOY / name).read_text(encoding="utf-8") for name in ("README.md", "kubernetes/README.md")}
COMMANDS = [words for text in GUIDES.values() for words in shell_blocks(text)]


def _ours(words: list[str]) -> list[str]:
    """What the command line gets: on this machine, or in a container."""
    rest = words[words.index("exec") :] if "exec" in words else words
    is_ours = "broker-fl" in (rest if "exec" in words else rest[:1])
    return rest[rest.index("broker-fl") + 1 :] if is_ours else []


OURS = [words for words in map(_ours, COMMANDS) if words]


def _without_redirection(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_of_ours_is_understood(words):
    parse_command(*_without_redirection(words))


def test_there_are_commands():
    assert len(OURS) > 15
    assert {words[0] for words in OURS} >= {"party", "certs", "topology", "status", "model"}


def test_services_that_are_named_are_those_of_compose():
    (compose,) = documents(DEPLOY / "compose.yaml")
    for words in COMMANDS:
        if words[:2] != ["docker", "compose"]:
            continue
        verb, *rest = words[2:]
        named = [word for word in _without_redirection(rest) if not word.startswith("-")]
        services = named[:1] if verb == "exec" else named
        if verb in ("exec", "stop", "start", "logs", "up", "pull"):
            assert set(services) <= compose["services"].keys(), words


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_are_named_are_there(guide):
    folder = (DEPLOY / guide).parent
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", GUIDES[guide]):
        if "://" not in target:
            assert (folder / target).exists(), target
    for name in re.findall(r"`((?:rabbitmq|federation|prometheus|grafana|systemd|kubernetes)/[\w./@-]*)`", GUIDES[guide]):
        assert (DEPLOY / name).exists(), name
