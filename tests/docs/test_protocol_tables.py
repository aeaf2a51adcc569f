"""The tables of docs/protocol.md against the code."""

import inspect
import re
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from by_the_document import CENTROIDS, DOCUMENT
from enrolled_parties import FEDERATION_KEY, key_of

from aggregator.admission import MAX_MAGNITUDE, Limits, Refused
from aggregator.broadcast import BroadcastPlan, make_frame
from aggregator.decisions import Verdict
from aggregator.gate import QUARANTINED_PER_MINUTE
from aggregator.service import Aggregator, Pace
from broker_fl.codecs import rotation
from broker_fl.codecs.codec import MAX_NAME, SMALL_TENSOR, parse_codec
from broker_fl.codecs.entropy import ANS, FIXED, PRECISION
from broker_fl.codecs.indices import GAPS, MAX_RICE_BITS
from broker_fl.codecs.quantize import BLOCK
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from broker_fl.config import KEYFRAME_CODECS, Settings, TrustSettings
from broker_fl.enrolment import Shelf
from broker_fl.parameters import manifest_of
from broker_fl.signing import SIGNATURE, Kind, canonical, statement_facts
from broker_fl.topology import (
    MIB,
    InboxLimits,
    Names,
    leadership,
    operator_policies,
    party,
    party_permissions,
    policies,
    shared,
)
from broker_fl.transports import model_log
from broker_fl.transports.parts import PART, PARTS, SHA256, SIZE
from broker_fl.transports.transport import Delivery
from schemas import wire
from schemas.event import Event, EventKind, UpdateFacts
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan
from schemas.ids import NAME_PATTERN
from schemas.manifest import Manifest, TensorSpec
from schemas.membership import Membership
from schemas.privacy import PrivacyFacts, PrivacyPlan
from schemas.receipt import Reason, Receipt
from schemas.update import ModelUpdate
from schemas.wire import MAX_CONTAINER_LENGTH
from workers import service as worker
from workers.outbox import StoredUpdate, open_outbox

NAMES = Names("F")


def _tables() -> dict[tuple[str, str], dict[str, list[str]]]:
    """By the first words of the section's and of the table's heading; cells by the first cell of their row."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for title, text in re.findall(r"^##+ ([^:\n]+).*?\n(.*?)(?=^##|\Z)", DOCUMENT, re.DOTALL | re.MULTILINE):
        for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            heading, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
            assert all(len(row) == len(heading) for row in rows), heading
            found[title, heading[0]] = {row[0].strip("`"): row[1:] for row in rows}
    return found


TABLES = _tables()

MESSAGES = [
    (ModelUpdate, "ModelUpdate", "field"),
    (ModelFrame, "ModelFrame", "field"),
    (KeyframePlace, "ModelFrame", "field of KeyframePlace"),
    (Plan, "ModelFrame", "field of Plan"),
    (Manifest, "Manifest and TensorSpec", "field of Manifest"),
    (TensorSpec, "Manifest and TensorSpec", "field of TensorSpec"),
    (TrainingPlan, "TrainingPlan", "field"),
    (PrivacyPlan, "PrivacyPlan and PrivacyFacts", "field of PrivacyPlan"),
    (PrivacyFacts, "PrivacyPlan and PrivacyFacts", "field of PrivacyFacts"),
    (Receipt, "Receipt", "field"),
    (Event, "Event", "field"),
    (UpdateFacts, "Event", "field of UpdateFacts"),
]
PATTERNS = {"name": NAME_PATTERN, "id": "^[0-9a-f]{32}$", "digest": "^[0-9a-f]{64}$"}


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


@pytest.mark.parametrize(("message", "section", "heading"), MESSAGES)
def test_every_type_is_documented_with_its_bounds(message, section, heading):
    properties = message.model_json_schema()["properties"]
    for name, (documented, _, _) in TABLES[section, heading].items():
        stated = _stated(properties[name])
        assert documented.endswith(" or nil") == stated["nil"], name
        assert _documented_type(documented) == stated["type"], name
        assert _documented_numbers(documented) == stated["numbers"], name


def _stated(schema: dict) -> dict:
    options = schema.get("anyOf", [schema])
    (option,) = [option for option in options if option.get("type") != "null"]
    bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems")
    numbers = {option[key] for key in (*bounds, "maxProperties") if key in option}
    if isinstance(option.get("items"), dict):
        numbers |= {option["items"][key] for key in bounds if key in option["items"]}
    kind = option.get("$ref", "").rpartition("/")[2] or option.get("type")
    if "enum" in option or "const" in option:
        kind = "literal"
    elif kind == "string":
        known = {pattern: name for name, pattern in PATTERNS.items()}
        kind = "binary" if option.get("format") == "binary" else known.get(option.get("pattern"), "string")
    return {"type": kind, "nil": len(options) > 1, "numbers": numbers}


def _documented_type(documented: str) -> str:
    kinds = {
        "text": "string",
        "bool": "boolean",
        "count": "integer",
        "list": "array",
        "map": "object",
        "one": "literal",
        "1": "integer",
    }
    first = re.split(r"[ ,]", documented)[0]
    if first.startswith("`"):
        return "literal"
    return "integer" if re.match(r"\d+ to ", documented) else kinds.get(first, first)


def _documented_numbers(documented: str) -> set[float]:
    """What JSON Schema would say: a count is below 2^53, and from 0 where nothing else is said."""
    text = re.sub(r"`.*?`", "", documented)
    numbers = {float(number.replace(",", "")) for number in re.findall(r"(?<!\^)\b\d[\d,]*(?:\.\d+)?\b(?!\^)", text)}
    numbers |= {float(int(base) ** int(power)) for base, power in re.findall(r"(\d+)\^(\d+)", text)}
    if text.startswith("count"):
        numbers |= {2.0**53} | (set() if "from" in text else {0.0})
    return numbers


def test_every_reason_kind_and_codec_is_documented():
    assert set(TABLES["The life of an update", "reason"]) == set(get_args(Reason))
    assert set(TABLES["Event", "kind"]) == set(get_args(EventKind))
    assert list(TABLES["Parts", "header"]) == [PART, PARTS, SIZE, SHA256]
    assert {codec.split(":")[0] for codec in TABLES["Choice", "sparsifier"]} == set(SPARSIFIERS)


def test_every_quantizer_is_documented_with_its_arguments_and_that_of_small_tensors():
    documented = {}
    for cell, (of_small, _, _) in TABLES["Values", "quantizer"].items():
        name, _, values = cell.partition(", ")
        kind, _, _ = name.strip("`").partition(":")
        documented[kind] = (of_small.strip("`"), tuple(int(number) for number in re.findall(r"\d+", values)))
    arguments = {kind: entry.arguments for kind, entry in QUANTIZERS.items()}
    assert documented == {
        kind: (entry.for_small, (arguments[kind][0], arguments[kind][-1]) if arguments[kind] else ())
        for kind, entry in QUANTIZERS.items()
    }
    (same,) = [name for name in TABLES["Codecs", "codec"] if "the same quantizer" in name]
    assert "dense" in same


@pytest.mark.parametrize("bits", QUANTIZERS["eden"].arguments)
def test_the_centroids_are_documented(bits):
    half = np.array(CENTROIDS[bits], np.float32)
    assert rotation.eden(bits).centroids.tolist() == [*(-half[::-1]).tolist(), *half.tolist()]


TOPOLOGIES = (shared("F"), party("F", "P"), leadership("F"))


def test_every_exchange_is_documented():
    exchanges = {exchange.name: exchange.kind for topology in TOPOLOGIES for exchange in topology.exchanges}
    assert {name: cells[0] for name, cells in TABLES["On the broker", "exchange"].items()} == exchanges


def test_every_queue_is_documented_with_its_arguments():
    queues = {queue.name: queue for topology in TOPOLOGIES for queue in topology.queues}
    documented = TABLES["On the broker", "queue"]
    assert set(documented) == set(queues)
    for name, queue in queues.items():
        kind, bound, arguments = documented[name]
        assert kind == queue.kind
        assert arguments == ", ".join(
            f"`{key}: {str(value).lower() if value is True else value}`" for key, value in queue.arguments.items()
        )
        exchanges = [binding.exchange for topology in TOPOLOGIES for binding in topology.bindings if binding.queue == name]
        assert all(f"`{exchange}`" in bound for exchange in exchanges)


@pytest.mark.parametrize("model_bytes", [1000, 20_000_000])
def test_every_policy_is_documented(model_bytes):
    m = max(model_bytes, MIB)
    documented = {}
    for name, (definition,) in TABLES["On the broker", "policy for"].items():
        pairs = [pair.split(": ") for pair in re.findall(r"`(.*?)`", definition)]
        documented[f"fl.F.{name}"] = {
            key: int(value.removesuffix("M") or 1) * m if "M" in value else value for key, value in pairs
        }
    made = {policy.name: dict(policy.definition) for policy in policies("F", model_bytes=model_bytes)}
    as_text = {name: {key: str(value) for key, value in definition.items()} for name, definition in made.items()}
    assert {name: {key: str(value) for key, value in given.items()} for name, given in documented.items()} == as_text


def test_every_operator_policy_is_documented():
    documented = {
        f"fl.F.{name}": dict(pair.split(": ") for pair in re.findall(r"`(.*?)`", definition))
        for name, (definition,) in TABLES["On the broker", "operator policy for"].items()
    }
    assert documented == {
        policy.name: {key: str(value) for key, value in policy.definition.items()} for policy in operator_policies("F")
    }
    enrolment = Settings().enrolment
    assert operator_policies("F") == operator_policies(
        "F", InboxLimits(messages=enrolment.inbox_messages, bytes=enrolment.inbox_bytes, ttl_s=enrolment.inbox_ttl_s)
    )


def test_the_register_is_documented():
    said = [name for cell in TABLES["The register of parties", "membership"] for name in re.findall(r"[a-z_]+", cell)]
    assert said == list(Membership.model_fields)
    shelf = Shelf(SimpleNamespace(vhost="V"), "F", None)
    assert list(TABLES["The register of parties", "global parameter"]) == [shelf.name_of("P"), shelf.key_name]


def test_what_is_signed_is_documented():
    assert tuple(TABLES["Signatures", "signed kind"]) == get_args(Kind)
    stated = {name for cell in TABLES["Signatures", "fact of an update"] for name in re.findall(r"[a-z_]+", cell)}
    assert stated == set(inspect.signature(statement_facts).parameters)
    text = " ".join(DOCUMENT.split())
    assert "broker-fl/KIND/1, a zero byte, the statement" in text
    assert f"in its header `{SIGNATURE}`" in text
    for number, written in ((1e16, "1e+16"), (1.5e-5, "1.5e-05"), (0.1, "0.1"), (1.0, "1.0"), (-2.5, "-2.5")):
        assert f"`{written}`" in text
        assert canonical({"a": number}) == f'{{"a":{written}}}'.encode()


def test_the_figures_of_trust_and_of_the_gate_are_documented():
    rows, trust = TABLES["The life of an update", "reason"], TrustSettings()
    assert f"over {trust.outlier_factor:g} times" in rows["outlier"][0]
    assert f"over {trust.norm_factor:g} times" in rows["norm"][0]
    assert (trust.direction_weight, "a tenth" in rows["direction"][0]) == (0.1, True)
    assert f"at most {QUARANTINED_PER_MINUTE} messages a minute" in " ".join(DOCUMENT.split())
    less = {reason for reason, (why,) in rows.items() if why.startswith("not refused: ")}
    assert less == {"norm", "direction", "tier"}


def test_the_permissions_are_documented():
    permissions = party_permissions("F", "P")
    documented = {right: cells[0].strip("`").replace("\\|", "|") for right, cells in TABLES["On the broker", "right"].items()}
    assert documented == {"configure": permissions.configure, "write": permissions.write, "read": permissions.read}


class Recorder:
    """Takes what a service publishes."""

    def __init__(self):
        self.messages = []

    async def publish(self, message):
        self.messages.append(message)


MANIFEST = manifest_of({"weight": np.zeros(2000, np.float32)})
HEADERS = {what: re.findall(r"`(x-fl-[a-z0-9-]+)`", cells[0]) for what, cells in TABLES["Messages", "message"].items()}


def _expect_documented(message, what):
    assert set(message.headers) == set(HEADERS[what])


def _aggregator():
    limits = Limits(names=Names("f"), manifest=MANIFEST, max_update_bytes=1 << 20, max_update_norm=None)
    pace = Pace(prefetch=1, group_updates=1, group_s=0.0, part_bytes=1 << 20, max_message_bytes=1 << 24)
    coordinator = SimpleNamespace(ledger_id="0" * 32)
    return Aggregator(None, coordinator, topology=shared("f"), limits=limits, pace=pace, clock=lambda: 0.0, key=FEDERATION_KEY)


def _frames():
    """An announcement with its keyframe, a delta frame, and an announcement with its keyframe as a rollback makes."""
    plan = BroadcastPlan(
        federation="f",
        ledger_id="0" * 32,
        manifest=MANIFEST,
        down="topk:0.01+int8",
        keyframe="float16",
        keyframe_every_frames=100,
        up="float32",
        warm_up_versions=0,
        warm_up_density=0.25,
        momentum_correction=0.0,
        training=TrainingPlan(),
        fraction=1.0,
        repeat=False,
        every_versions=1,
        every_s=1.0,
    )
    model = np.linspace(-1, 1, MANIFEST.size, dtype=np.float32)
    first, held = make_frame(plan, None, model, version=0, over=False, at=0.0)
    second, held = make_frame(plan, held, model * np.float32(1.5), version=1, over=False, at=0.0)
    return first, second, make_frame(plan, held, model, version=2, over=False, at=0.0, is_anew=True)[0]


async def test_the_headers_and_the_ids_of_frames_are_documented():
    recorder = Recorder()
    for row in _frames():
        await _aggregator()._publish_frame(recorder, row)
    keyframe, announcement, delta, *anew = recorder.messages
    assert (keyframe.exchange, announcement.exchange, delta.exchange) == ("fl.f.keyframes", "fl.f.model", "fl.f.model")
    for message, what in ((keyframe, "keyframe"), (announcement, "announcement"), (delta, "delta frame")):
        _expect_documented(message, what)
        assert f"(`{message.headers['x-fl-kind']}`)" in TABLES["Messages", "message"][what][0]
        assert message.headers["x-fl-bytes"] == len(message.body)
        frame = wire.decode(ModelFrame, message.body)
        assert message.message_id == f"{frame.digest[:16]}-{frame.number}"
        assert (frame.base is None, frame.payload == b"") == {
            "keyframe": (True, False),
            "announcement": (True, True),
            "delta frame": (False, False),
        }[what]
    for message, what in zip(anew, ("keyframe", "announcement"), strict=True):
        _expect_documented(message, what)
        assert f"(`{message.headers['x-fl-kind']}`)" in TABLES["Messages", "message"][what][0]


def test_the_byte_counts_of_frames_are_as_documented():
    first, second, third = _frames()
    announcement, keyframe, delta = (wire.decode(ModelFrame, body) for body in (first.body, first.keyframe, second.body))
    assert announcement.log_bytes == keyframe.log_bytes == announcement.keyframe.log_bytes == 0
    assert announcement.keyframe.bytes == len(keyframe.payload) == 2 * MANIFEST.size
    assert delta.log_bytes == len(delta.payload)
    assert second.log_bytes == len(second.body)
    # A later frame without a base counts more than any keyframe has, so that nobody reckons that changes lead past it.
    assert "8 bytes a parameter + 65,536" in " ".join(DOCUMENT.split())
    anew, whole = (wire.decode(ModelFrame, body) for body in (third.body, third.keyframe))
    assert (anew.number, anew.base, anew.payload) == (3, None, b"")
    assert anew.log_bytes == whole.log_bytes == anew.keyframe.log_bytes == second.log_bytes + 8 * MANIFEST.size + 65_536
    assert anew.log_bytes - second.log_bytes > max(len(third.keyframe), 4 * MANIFEST.size)
    assert announcement.rounding == "float16"


async def test_the_facts_of_a_published_frame_are_documented():
    with_keyframe = ("keyframe_bytes", "keyframe_codec")
    for row, more in zip(_frames(), (with_keyframe, (), with_keyframe), strict=True):
        recorder, aggregator = Recorder(), _aggregator()
        await aggregator._tell_published(recorder, row)
        facts = wire.decode(Event, recorder.messages[0].body).facts
        assert recorder.messages[0].routing_key == "frame.published"
        assert not recorder.messages[0].mandatory
        always, _, beside = TABLES["Event", "kind"]["frame.published"][0].partition(";")
        assert list(facts) == [*re.findall(r"`(.*?)`", always), *(re.findall(r"`(.*?)`", beside) if more else [])]
        assert [facts[key] for key in more] == ([len(row.keyframe), "float16"] if more else [])


async def test_the_headers_of_receipts_and_of_what_is_in_quarantine_are_documented():
    came = dict.fromkeys([*HEADERS["update"], PART, PARTS, SIZE, SHA256, "x-fl-other"], "x" * 300)
    delivery = Delivery(
        body=b"body",
        headers=came,
        message_id="0" * 32,
        user_id=None,
        exchange="fl.f.up.p",
        routing_key="",
        redelivered=False,
        tag=1,
        offset=None,
    )
    receipt = Receipt(federation="f", party="p", update_id="0" * 32, outcome="refused", version=1, staleness=0, weight=0.0)
    recorder, aggregator, verdict = Recorder(), _aggregator(), Verdict(receipt, Refused("base", "y" * 300))
    await aggregator._answer(recorder, delivery, verdict, *aggregator._receipts([verdict]))
    quarantined, answered = recorder.messages
    _expect_documented(answered, "receipt")
    assert answered.routing_key == "p"
    assert answered.message_id == quarantined.message_id == "0" * 32
    assert set(quarantined.headers) == set(HEADERS["quarantined"])
    assert {len(quarantined.headers[key]) for key in ("x-fl-codec", "x-fl-detail")} == {200}
    assert (quarantined.headers["x-fl-user"], quarantined.body) == ("", b"body")


async def test_the_headers_of_updates_are_documented(tmp_path):
    recorder = Recorder()
    initial = np.zeros(MANIFEST.size, np.float32)
    identity = worker.Identity(federation="f", party="p", manifest=MANIFEST, initial=initial, key=key_of("p"))
    update = ModelUpdate(
        federation="f",
        ledger="0" * 32,
        party="p",
        update_id="0" * 32,
        sequence=1,
        base_version=7,
        base_digest="0" * 64,
        manifest_digest=MANIFEST.digest,
        codec="float32",
        num_samples=1,
        num_steps=1,
        train_loss=0.5,
        payload=b"payload",
    )
    link = worker.Link(part_bytes=1 << 20, max_message_bytes=1 << 24, inbox_grace_s=1.0)
    with open_outbox(tmp_path, party="p", federation="f") as outbox:
        sender = worker.Worker(
            None,
            outbox,
            None,
            None,
            identity=identity,
            link=link,
            budget=worker.Budget(),
            throttle=1.0,
            resend_after_s=120.0,
            clock=lambda: 0.0,
        )
        stored = StoredUpdate(1, "0" * 32, wire.encode(update), 7, "float32")
        with outbox.transaction():
            outbox.add(stored)
        await sender._send(recorder, stored)
    (message,) = recorder.messages
    _expect_documented(message, "update")
    assert (message.exchange, message.message_id) == ("fl.f.up.p", "0" * 32)
    assert (message.body, message.headers["x-fl-bytes"]) == (wire.encode(update), len(message.body))


def test_the_numbers_in_the_text_are_those_of_the_code():
    text = " ".join(DOCUMENT.split())
    settings = Settings()
    for said in (
        NAME_PATTERN.strip("^$"),
        f"A tensor of up to {SMALL_TENSOR:,} elements is small",
        f"at most {MAX_NAME} characters. A tensor",
        f"blocks of {BLOCK:,} values (the last one may be shorter)",
        f"Each block of {GAPS} gaps",
        f"⌈k / {GAPS}⌉ | r of each block, at most {MAX_RICE_BITS}",
        f"which sum to 2^{PRECISION}",
        f"| {FIXED} | ⌈n x w / 8⌉",
        f"| {ANS} | ANS",
        f"a list or map of more than {MAX_CONTAINER_LENGTH:,} entries",
        f"a decoded value of magnitude over 10^{len(str(int(MAX_MAGNITUDE))) - 1}",
        f"an element of magnitude 10^{len(str(int(worker._DIVERGED))) - 1} or more",
        f"{settings.broker.max_message_bytes >> 20} MiB unless configured",
        "to nearest: " + " or ".join([", ".join(f"`{codec}`" for codec in KEYFRAME_CODECS[:-1]), f"`{KEYFRAME_CODECS[-1]}`"]),
    ):
        assert said in text, said
    assert "Without a receipt after two minutes" in text
    assert "and so on up to an hour" in text
    resent = (settings.worker.resend_after_s, worker._RESEND_AFTER_AT_MOST_S)
    assert (*resent, worker._NEVER_TAKEN) == (120, 3600, ("bounds", "non_finite", "outlier"))
    assert "but not where the reason is `bounds`, `non_finite` or `outlier`" in text
    dense = [name for name in QUANTIZERS if QUANTIZERS[name].for_small == name]
    assert tuple(dense) == KEYFRAME_CODECS
    assert all(parse_codec(codec).sparsifier is None for codec in dense)


def test_a_log_is_entered_as_far_back_as_documented():
    text = " ".join(DOCUMENT.split())
    assert "With d = (n - the wanted number) x messages a frame + p, attach d + 4 before its offset" in text
    assert "with the d of there: by d, next by d + 4, by 4 and by 16 times as much, then to `first`" in text
    d = (20 - 8) * 3 + 2
    place = model_log.Place(offset=1000, number=20, part=2, parts=3)
    found = [None if times is None else 1000 - place.before(8, times=times) for times in (1, *model_log._REWINDS)]
    assert found == [d + 4, d, d + 4, 4 * (d + 4), 16 * (d + 4), None]
