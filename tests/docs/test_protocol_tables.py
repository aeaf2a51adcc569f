"""The tables of docs/protocol.md against the code."""

import re
from pathlib import Path
from typing import get_args

import pytest

from broker_fl.codecs.codec import SMALL_TENSOR
from broker_fl.codecs.quantize import BLOCK, QUANTIZERS
from broker_fl.topology import Names, party, party_permissions, shared
from broker_fl.transports.parts import PART, PARTS, SHA256, SIZE
from schemas.event import Event, EventKind, UpdateFacts
from schemas.frame import ModelFrame, TrainingPlan
from schemas.ids import NAME_PATTERN
from schemas.manifest import Manifest, TensorSpec
from schemas.receipt import Reason, Receipt
from schemas.update import ModelUpdate
from schemas.wire import MAX_CONTAINER_LENGTH

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
NAMES = Names("F")


def _tables() -> dict[tuple[str, str], dict[str, list[str]]]:
    """By the first words of the section's and of the table's heading; cells by the first cell of their row."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for title, text in re.findall(r"^##+ ([^:\n]+).*?\n(.*?)(?=^##|\Z)", DOCUMENT, re.DOTALL | re.MULTILINE):
        for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            heading, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
            found[title, heading[0]] = {row[0].strip("`"): row[1:] for row in rows}
    return found


TABLES = _tables()

MESSAGES = [
    (ModelUpdate, "ModelUpdate", "field"),
    (ModelFrame, "ModelFrame", "field"),
    (Manifest, "Manifest and TensorSpec", "field of Manifest"),
    (TensorSpec, "Manifest and TensorSpec", "field of TensorSpec"),
    (TrainingPlan, "TrainingPlan", "field"),
    (Receipt, "Receipt", "field"),
    (Event, "Event", "field"),
    (UpdateFacts, "Event", "field of UpdateFacts"),
]


@pytest.mark.parametrize(("message", "section", "heading"), MESSAGES)
def test_every_field_is_documented_in_its_order(message, section, heading):
    assert list(TABLES[section, heading]) == list(message.model_fields)


@pytest.mark.parametrize(("message", "section", "heading"), MESSAGES)
def test_every_default_is_documented(message, section, heading):
    for name, (_, default, _) in TABLES[section, heading].items():
        field = message.model_fields[name]
        shown = {"": None, "nil": None, "`[]`": (), '`""`': ""}.get(default, default.strip('`"'))
        assert (default != "") == (not field.is_required()), name
        assert field.is_required() or str(field.default) == str(shown), name


def test_every_reason_and_kind_is_documented():
    assert set(TABLES["The life of an update", "reason"]) == set(get_args(Reason))
    assert set(TABLES["Event", "kind"]) == set(get_args(EventKind))
    assert set(TABLES["Codecs", "quantizer"]) == set(QUANTIZERS)
    assert list(TABLES["Parts", "header"]) == [PART, PARTS, SIZE, SHA256]


def test_every_exchange_is_documented():
    exchanges = {exchange.name: exchange.kind for topology in (shared("F"), party("F", "P")) for exchange in topology.exchanges}
    assert {name: cells[0] for name, cells in TABLES["On the broker", "exchange"].items()} == exchanges


def test_every_queue_is_documented_with_its_arguments():
    queues = {queue.name: queue for topology in (shared("F"), party("F", "P")) for queue in topology.queues}
    documented = TABLES["On the broker", "queue"]
    assert set(documented) == {*queues, NAMES.aggregator}
    for name, queue in queues.items():
        kind, bound, arguments = documented[name]
        assert kind == queue.kind
        assert arguments == ", ".join(
            f"`{key}: {str(value).lower() if value is True else value}`" for key, value in queue.arguments.items()
        )
        exchanges = [
            binding.exchange
            for topology in (shared("F"), party("F", "P"))
            for binding in topology.bindings
            if binding.queue == name
        ]
        assert all(f"`{exchange}`" in bound for exchange in exchanges)


def test_the_permissions_are_documented():
    permissions = party_permissions("F", "P")
    documented = {right: cells[0].strip("`").replace("\\|", "|") for right, cells in TABLES["On the broker", "right"].items()}
    assert documented == {"configure": permissions.configure, "write": permissions.write, "read": permissions.read}


def test_the_numbers_in_the_text_are_those_of_the_code():
    assert NAME_PATTERN.strip("^$") in DOCUMENT
    assert f"tensors of up to {SMALL_TENSOR:,} elements are small" in DOCUMENT
    assert f"a block of {BLOCK:,} values" in DOCUMENT
    assert f"a list or map of more than {MAX_CONTAINER_LENGTH:,} entries" in DOCUMENT
