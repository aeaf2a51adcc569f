"""One message of each kind, and hypothesis strategies for all that there may be."""

from typing import get_args

from hypothesis import strategies as st

from schemas.event import Event, UpdateFacts
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan
from schemas.manifest import Manifest, TensorSpec
from schemas.membership import Membership, SignedMembership
from schemas.privacy import PrivacyFacts, PrivacyPlan
from schemas.receipt import Reason, Receipt
from schemas.update import ModelUpdate
from schemas.wire import Message

TWO_TENSORS = Manifest(
    tensors=(TensorSpec(name="conv.weight", shape=(2, 3), offset=0), TensorSpec(name="conv.bias", shape=(2,), offset=6))
)

SAMPLES: dict[str, Message] = {
    "update": ModelUpdate(
        federation="hospitals",
        ledger="fedcba9876543210" * 2,
        party="charite-2",
        update_id="0123456789abcdef" * 2,
        sequence=7,
        base_version=41,
        base_digest="ab" * 32,
        manifest_digest=TWO_TENSORS.digest,
        codec="topk:0.01+int4",
        num_samples=4708,
        num_steps=735,
        train_loss=0.25,
        payload=b"\x00\x01\xff",
    ),
    "noised update": ModelUpdate(
        federation="hospitals",
        party="charite-2",
        update_id="0123456789abcdef" * 2,
        sequence=7,
        base_version=41,
        base_digest="ab" * 32,
        manifest_digest=TWO_TENSORS.digest,
        codec="eden:2",
        num_samples=4708,
        num_steps=735,
        train_loss=None,
        privacy=PrivacyFacts(noise_multiplier=1.1, sample_rate=0.0625, max_grad_norm=0.5),
        payload=b"\x00\x01\xff",
    ),
    "frame": ModelFrame(
        federation="hospitals",
        ledger="fedcba9876543210" * 2,
        number=3,
        base=2,
        version=41,
        digest="cd" * 32,
        codec="topk:0.05+int8",
        rounding="bfloat16",
        keyframe=KeyframePlace(number=1, bytes=32, log_bytes=0),
        log_bytes=57,
        over=True,
        plan=Plan(
            training=TrainingPlan(steps=50, optimizer="adamw"),
            update_codec="int8",
            momentum_correction=0.9,
            fraction=0.5,
            repeat=False,
            privacy=PrivacyPlan(
                target_epsilon=8.0, planned_trainings=40, max_grad_norm=0.5, delta=1e-5, accountant="prv", max_epsilon=9.5
            ),
        ),
        payload=b"\x07",
    ),
    "announcement": ModelFrame(
        federation="hospitals",
        ledger="fedcba9876543210" * 2,
        number=1,
        base=None,
        version=0,
        digest="cd" * 32,
        codec="float32",
        keyframe=KeyframePlace(number=1, bytes=32, log_bytes=0),
        log_bytes=0,
        over=False,
        manifest=TWO_TENSORS,
        plan=Plan(training=TrainingPlan(), update_codec="topk:0.01+int4", fraction=1.0, repeat=True),
        payload=b"",
    ),
    "receipt": Receipt(
        federation="hospitals",
        party="charite-2",
        update_id="0123456789abcdef" * 2,
        outcome="refused",
        version=80,
        staleness=39,
        weight=0.0,
        codec="topk:0.01+int4",
        bytes=980,
        reason="too_stale",
        detail="39 versions late, the bound is 32",
    ),
    "event": Event(
        kind="updates.decided",
        federation="hospitals",
        at=1_700_000_000.5,
        version=42,
        facts={"number": 3, "seconds": 0.5, "codec": "int8", "over": False},
        updates=(
            UpdateFacts(
                party="charite-2", outcome="merged", staleness=1, weight=0.2, bytes=980, codec="int8", reason=None, epsilon=0.75
            ),
            UpdateFacts(party=None, outcome="refused", staleness=0, weight=0.0, bytes=7, codec="", reason="identity"),
        ),
    ),
    "membership": SignedMembership(
        membership=Membership(
            federation="hospitals",
            party="charite-2",
            revision=1_700_000_000_500,
            at=1_700_000_000.5,
            public_key="ab" * 32,
            display_name="Charit\u00e9",
            group="berlin",
            num_samples=4708,
            tier="probation",
            suspended=True,
            reason="its score fell to 0.28",
        ),
        signature="cd" * 64,
    ),
    "manifest": TWO_TENSORS,
    "plan": Plan(training=TrainingPlan(), update_codec="int8", fraction=0.5, repeat=True),
    "privacy facts": PrivacyFacts(noise_multiplier=1.1, sample_rate=1.0, max_grad_norm=0.5),
    "training": TrainingPlan(),
}

COUNTERS = st.integers(0, 2**53 - 1)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
HEX32 = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
HEX64 = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Of characters that UTF-8 can carry.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=64)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(TEXTS.filter(lambda text: text and "\n" not in text), min_size=1, max_size=5, unique=True))
    specs: list[TensorSpec] = []
    for name in names:
        shape = tuple(draw(st.lists(st.integers(1, 40), max_size=3)))
        offset = specs[-1].offset + specs[-1].size if specs else 0
        specs.append(TensorSpec(name=name, shape=shape, offset=offset))
    return Manifest(tensors=tuple(specs))


TRAINING_PLANS = st.builds(
    TrainingPlan,
    epochs=st.integers(1, 10_000),
    steps=st.none() | st.integers(1, 10_000_000),
    batch_size=st.integers(1, 1_000_000),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    learning_rate=st.floats(0, 100, exclude_min=True),
    decay_versions=st.none() | st.integers(1, 2**53 - 1),
    decay_to=st.floats(0, 1, exclude_min=True),
    momentum=st.floats(0, 1, exclude_max=True),
    weight_decay=st.floats(0, 10),
    proximal=st.floats(0, 1000),
)

NOISE_MULTIPLIERS = st.floats(0.01, 1000)
EPSILONS = NORMS = st.floats(0, 1e6, exclude_min=True)


@st.composite
def privacy_plans(draw: st.DrawFn) -> PrivacyPlan:
    target = draw(st.none() | EPSILONS)
    return PrivacyPlan(
        noise_multiplier=draw(NOISE_MULTIPLIERS) if target is None else None,
        target_epsilon=target,
        planned_trainings=None if target is None else draw(st.integers(1, 2**53 - 1)),
        max_grad_norm=draw(NORMS),
        clipping=draw(st.sampled_from(["auto", "flat", "ghost"])),
        delta=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        accountant=draw(st.sampled_from(["rdp", "prv", "gdp"])),
        max_epsilon=draw(st.none() | EPSILONS),
    )


PRIVACY_FACTS = st.builds(
    PrivacyFacts,
    noise_multiplier=NOISE_MULTIPLIERS,
    sample_rate=st.floats(0, 1, exclude_min=True),
    max_grad_norm=NORMS,
)

PLANS = st.builds(
    Plan,
    training=TRAINING_PLANS,
    update_codec=TEXTS,
    momentum_correction=st.floats(0, 1, exclude_max=True),
    fraction=st.floats(0, 1, exclude_min=True),
    repeat=st.booleans(),
    privacy=st.none() | privacy_plans(),
)

FRAME_FIELDS: dict[str, st.SearchStrategy[object]] = {
    "federation": NAMES,
    "ledger": HEX32,
    "version": COUNTERS,
    "digest": HEX64,
    "codec": TEXTS,
    "rounding": st.none() | TEXTS,
    "keyframe": st.builds(KeyframePlace, number=st.integers(1, 2**53 - 1), bytes=COUNTERS, log_bytes=COUNTERS),
    "log_bytes": COUNTERS,
    "over": st.booleans(),
    "payload": st.binary(max_size=200),
}

UPDATES = st.builds(
    ModelUpdate,
    federation=NAMES,
    ledger=st.none() | HEX32,
    party=NAMES,
    update_id=HEX32,
    sequence=st.integers(1, 2**53 - 1),
    base_version=COUNTERS,
    base_digest=HEX64,
    manifest_digest=HEX64,
    codec=TEXTS,
    num_samples=st.integers(1, 10**12),
    num_steps=st.integers(1, 2**53 - 1),
    train_loss=st.none() | FINITE,
    privacy=st.none() | PRIVACY_FACTS,
    payload=st.binary(max_size=200),
)

MESSAGES: dict[str, st.SearchStrategy[Message]] = {
    "update": UPDATES,
    "noised update": UPDATES,
    "frame": st.builds(
        ModelFrame,
        **FRAME_FIELDS,
        number=st.integers(2**40, 2**53 - 1),
        base=st.integers(1, 2**40 - 1),
        manifest=st.none() | manifests(),
        plan=st.none() | PLANS,
    ),
    "announcement": st.builds(
        ModelFrame, **FRAME_FIELDS, number=st.integers(1, 2**53 - 1), base=st.none(), manifest=manifests(), plan=PLANS
    ),
    "receipt": st.builds(
        Receipt,
        federation=NAMES,
        party=NAMES,
        update_id=HEX32,
        outcome=st.sampled_from(["merged", "buffered", "refused"]),
        version=COUNTERS,
        staleness=COUNTERS,
        weight=FINITE,
        codec=TEXTS,
        bytes=COUNTERS,
        reason=st.none() | st.sampled_from(get_args(Reason)),
        detail=TEXTS,
    ),
    "event": st.builds(
        Event,
        kind=st.sampled_from(["updates.decided", "model.evaluated", "frame.published"]),
        federation=NAMES,
        at=FINITE,
        version=COUNTERS,
        facts=st.dictionaries(TEXTS, st.booleans() | st.integers(-(2**63), 2**64 - 1) | FINITE | TEXTS, max_size=8),
        updates=st.lists(
            st.builds(
                UpdateFacts,
                party=st.none() | NAMES,
                outcome=st.sampled_from(["merged", "buffered", "refused", "duplicate"]),
                staleness=COUNTERS,
                weight=FINITE,
                bytes=COUNTERS,
                codec=TEXTS,
                reason=st.none() | st.sampled_from(["codec", "base"]),
                epsilon=st.none() | FINITE,
            ),
            max_size=2,
        ),
    ),
    "membership": st.builds(
        SignedMembership,
        membership=st.builds(
            Membership,
            federation=NAMES,
            party=NAMES,
            revision=st.integers(1, 2**53 - 1),
            at=FINITE,
            public_key=st.none() | HEX64,
            display_name=st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=64),
            group=st.none() | NAMES,
            num_samples=st.none() | st.integers(1, 10**12),
            tier=NAMES,
            suspended=st.booleans(),
            reason=TEXTS,
        ),
        signature=st.from_regex(r"[0-9a-f]{128}", fullmatch=True),
    ),
    "manifest": manifests(),
    "plan": PLANS,
    "privacy facts": PRIVACY_FACTS,
    "training": TRAINING_PLANS,
}
