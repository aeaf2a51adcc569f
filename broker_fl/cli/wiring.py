"""Puts the rooms together: services made from settings, with whatever broker they are given."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from aggregator.admission import Limits
from aggregator.broadcast import BroadcastPlan
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Goal
from aggregator.evaluator import Evaluator, Score
from aggregator.evaluator import Observer as EvaluatorObserver
from aggregator.gate import Gate
from aggregator.merging.strategies import build_strategy
from aggregator.observer import Observer as AggregatorObserver
from aggregator.opening import open_ledger
from aggregator.register import Register
from aggregator.service import Aggregator, Pace
from broker_fl.cli.stores import holder, ledger_url, snapshots_of
from broker_fl.codecs.budget import fitted
from broker_fl.codecs.codec import Codec, parse_codec
from broker_fl.codecs.registry import SPARSIFIERS
from broker_fl.config import Settings
from broker_fl.database import make_folder
from broker_fl.errors import ConfigurationError
from broker_fl.keys import key_of, load_key, load_or_make_key
from broker_fl.parameters import Vector
from broker_fl.privacy.policy import Demands, Mechanism
from broker_fl.privacy.policy import Limits as PartyLimits
from broker_fl.signing import SigningKey
from broker_fl.tasks.device import choose_device
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial, load_vector
from broker_fl.tasks.partition import split
from broker_fl.tasks.registry import load_task
from broker_fl.tasks.task import Examples, Task
from broker_fl.topology import Names, shared
from broker_fl.transports.transport import Connect
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from workers.encoding import Budget, check_budget, fields_bytes
from workers.observer import Observer as WorkerObserver
from workers.outbox import open_outbox
from workers.privacy import PrivacyBudget
from workers.service import Identity, Link, Worker
from workers.spending import spending_file
from workers.trainer import TrainResult, train

_PREFETCHED_BYTES = 512 << 20
_COPIES = 3
"""Of an update on its way: message, payload and decoded delta (measured: a model of 16 MB took 1.6 GB with 33 in flight)."""
_LEAST_PREFETCH = 8
_HEARTBEATS_UNTIL_LOST = 3


def task_of(settings: Settings) -> Task:
    task = settings.task
    return load_task(task.name, model=task.model, classes=task.classes, image_shape=task.image_shape, features=task.features)


@dataclass(frozen=True, slots=True)
class BuiltAggregator:
    service: Aggregator
    open_state: Callable[[], None]
    coordinator: Coordinator
    manifest: Manifest


@contextmanager
def built_aggregator(
    settings: Settings,
    connect: Connect,
    *,
    on_lead: Callable[[], None] = lambda: None,
    register: Register | None = None,
    observer: AggregatorObserver | None = None,
) -> Iterator[BuiltAggregator]:
    """Raises ConfigurationError, DataError, StorageError. `on_lead` is called when it begins to lead the federation, `register`
    says who is enrolled: signatures need one."""
    up, down = parse_codec(settings.update_codec), parse_codec(settings.codec.down)
    _refuse_selected_noise(settings, up)
    task = task_of(settings)
    _, manifest, model = _initial(settings, task)
    if settings.codec.up_budget is not None:
        with _named("[codec] up_budget"):
            up = fitted(up, settings.codec.up_budget, manifest=manifest)
    limits = _limits(settings, manifest)
    if settings.security.signatures and register is None:
        raise ConfigurationError("[security] signatures = true needs a register of the parties' keys, and this broker keeps none")
    if settings.aggregator.ledger is None:
        make_folder(settings.aggregator.state)
    key = load_or_make_key(settings.key_file) if settings.security.signatures else None
    with open_ledger(ledger_url(settings)) as ledger:
        ledger_id = ledger.facts()["ledger_id"]
        limits = replace(limits, signed_for=None if key is None else ledger_id)
        plan = _plan(settings, manifest, ledger_id=ledger_id, up=up.name, down=down.name)
        with _named("[codec] warm_up_versions"):
            plan.at(0)  # A codec that cannot warm up is a mistake in the settings, to be told before anything is opened.
        rules = Rules(
            limits=limits,
            merging=settings.merging,
            plan=plan,
            goal=Goal(settings.aggregator.versions, settings.aggregator.target_accuracy),
            snapshot_every_versions=settings.aggregator.snapshot_every_versions,
            parts_expire_s=settings.aggregator.parts_expire_s,
            trust=settings.trust,
            federation_key=None if key is None else key.public,
        )
        coordinator = Coordinator(ledger, snapshots_of(settings, manifest), rules, clock=time.time, holder=holder("aggregator"))
        service = Aggregator(
            connect,
            coordinator,
            topology=shared(settings.federation.name),
            limits=limits,
            pace=_pace(settings, limits),
            clock=time.time,
            seconds=settings.aggregator.seconds,
            on_lead=on_lead,
            register=register,
            key=key,
            gate=_gate(settings, limits),
            observer=observer,
        )
        yield BuiltAggregator(service, partial(coordinator.open, model), coordinator, manifest)


@contextmanager
def _named(keys: str) -> Iterator[None]:
    """Mistakes that only show where several settings meet say which key asked for it."""
    try:
        yield
    except ConfigurationError as exc:
        raise ConfigurationError(f"{keys}: {exc}") from exc


def _limits(settings: Settings, manifest: Manifest) -> Limits:
    dense_bytes = 4 * manifest.size + (64 << 10)
    return Limits(
        names=Names(settings.federation.name),
        manifest=manifest,
        max_update_bytes=settings.aggregator.max_update_bytes or dense_bytes,
        max_update_norm=settings.aggregator.max_update_norm,
        privacy=_demands(settings),
    )


def _gate(settings: Settings, limits: Limits) -> Gate:
    return Gate(
        per_minute=settings.trust.max_updates_per_minute,
        part_bytes=settings.broker.part_bytes,
        max_update_bytes=limits.max_update_bytes,
    )


def _plan(settings: Settings, manifest: Manifest, *, ledger_id: str, up: str, down: str) -> BroadcastPlan:
    strategy = build_strategy(settings.merging)
    return BroadcastPlan(
        federation=settings.federation.name,
        ledger_id=ledger_id,
        manifest=manifest,
        down=down,
        keyframe=settings.codec.keyframe,
        keyframe_every_frames=settings.codec.keyframe_every_frames,
        up=up,
        warm_up_versions=settings.codec.warm_up_versions,
        warm_up_density=settings.codec.warm_up_density,
        momentum_correction=settings.codec.momentum_correction,
        training=settings.training.plan(),
        fraction=settings.aggregator.fraction,
        repeat=strategy.may_repeat,
        every_versions=1 if strategy.one_per_version else settings.aggregator.broadcast_every_merges,
        every_s=settings.aggregator.broadcast_every_s,
        privacy=settings.privacy.plan(),
    )


def _initial(settings: Settings, task: Task) -> tuple[nn.Module, Manifest, Vector]:
    return initial(task, settings.task.data, settings.task.seed, by_example=settings.privacy.is_asked_for)


def _demands(settings: Settings) -> Demands | None:
    plan = settings.privacy.plan()
    return None if plan is None else Demands(plan, settings.privacy.least_noise)


def _refuse_selected_noise(settings: Settings, codec: Codec) -> None:
    if not settings.privacy.is_asked_for or settings.privacy.allow_topk or codec.sparsifier is None:
        return
    if SPARSIFIERS[codec.sparsifier.kind].by_magnitude:
        raise ConfigurationError(
            f"[codec] up = {codec.name!r} sends the largest values, and under [privacy] those are the largest noise: take a "
            "quantizer alone (int8, eden:2), or a mask that does not look (randomk:0.1+int8); or set privacy.allow_topk = true"
        )


def _pace(settings: Settings, limits: Limits) -> Pace:
    """RabbitMQ counts messages, not bytes: the prefetch keeps what the largest updates would take within bounds."""
    within_memory = max(_LEAST_PREFETCH, _PREFETCHED_BYTES // (_COPIES * limits.max_update_bytes))
    return Pace(
        prefetch=min(settings.aggregator.prefetch, within_memory),
        group_updates=settings.aggregator.group_updates,
        group_s=settings.aggregator.group_ms / 1000,
        part_bytes=settings.broker.part_bytes,
        max_message_bytes=settings.broker.max_message_bytes,
    )


@contextmanager
def built_worker(settings: Settings, connect: Connect, *, observer: WorkerObserver | None = None) -> Iterator[Worker]:
    """Holds the outbox alone while inside. Raises ConfigurationError, DataError, StorageError."""
    party = settings.worker.party
    if party is None:
        raise ConfigurationError("which party? name it by --party NAME or --enrolment NAME.toml")
    task = task_of(settings)
    examples = share_of(settings, task.train_examples(settings.task.data))
    module, manifest, model = _initial(settings, task)
    device = choose_device(settings.worker.device)
    identity = Identity(
        settings.federation.name, party, manifest, model, federation_key=federation_key(settings), key=_party_key(settings)
    )

    def train_here(
        base: Vector, plan: TrainingPlan, *, mechanism: Mechanism | None, seed: int, should_stop: Callable[[], bool]
    ) -> TrainResult | None:
        if mechanism is not None:
            _refuse_rounded_norms(settings)
            # Opacus takes a second to import, and most workers do without it.
            from workers.dp import train_privately

            return train_privately(
                task,
                module,
                examples,
                base=base,
                manifest=manifest,
                plan=plan,
                mechanism=mechanism,
                device=device,
                chunk=settings.worker.examples_at_once,
                seed=seed,
                should_stop=should_stop,
            )
        return train(
            task,
            module,
            examples,
            base=base,
            manifest=manifest,
            plan=plan,
            device=device,
            precision=settings.worker.precision,
            channels_last=settings.worker.channels_last,
            seed=seed,
            should_stop=should_stop,
        )

    link = Link(
        part_bytes=settings.broker.part_bytes,
        max_message_bytes=settings.broker.max_message_bytes,
        inbox_grace_s=_HEARTBEATS_UNTIL_LOST * settings.broker.heartbeat_s,
    )
    budget = _budget(settings, identity)
    with open_outbox(settings.worker.state, party=party, federation=settings.federation.name) as outbox:
        privacy = PrivacyBudget(
            outbox,
            file=spending_file(settings.worker.state, party, settings.privacy.record),
            limits=_limits_of_party(settings),
            federation=settings.federation.name,
            party=party,
            num_examples=len(examples),
            clock=time.time,
        )
        yield Worker(
            connect,
            outbox,
            train_here,
            privacy,
            identity=identity,
            link=link,
            budget=budget,
            throttle=settings.worker.throttle,
            resend_after_s=settings.worker.resend_after_s,
            clock=time.time,
            observer=observer,
        )


def _limits_of_party(settings: Settings) -> PartyLimits:
    own = settings.privacy
    return PartyLimits(
        delta=own.delta,
        accountant=own.accountant,
        max_epsilon=own.most_epsilon,
        min_noise_multiplier=own.least_noise,
        must_be_noised=own.is_asked_for,
    )


def _refuse_rounded_norms(settings: Settings) -> None:
    if settings.worker.precision != "float32":
        raise ConfigurationError(
            f"[worker] precision = {settings.worker.precision!r} rounds the norms of gradients, and one that is rounded down is "
            "clipped too little: under differential privacy take float32"
        )


def _budget(settings: Settings, identity: Identity) -> Budget:
    """Raises ConfigurationError for one that no update stays within, as far as this party's settings know the codec."""
    budget = Budget(bytes=settings.worker.budget, seconds=settings.worker.budget_seconds)
    is_noised = settings.privacy.is_asked_for
    facts = fields_bytes(federation=identity.federation, party=identity.party, is_noised=is_noised)
    check_budget(budget, codec=settings.update_codec, manifest=identity.manifest, fields_bytes=facts)
    return budget


def share_of(settings: Settings, examples: Examples) -> Examples:
    """This worker's part where one data set is dealt out; all of it where each party has its own."""
    partition, share = settings.partition, settings.worker.share
    if partition.scheme == "none":
        if share is not None:
            raise ConfigurationError(
                f"--share {share} says which part to take, but not how to part: --set partition.scheme=iid (or dirichlet, shards)"
            )
        return examples
    if share is None:
        raise ConfigurationError(
            f"[partition] scheme = {partition.scheme!r} deals one data set out: say which part by --share I/N"
        )
    index, parties = (int(number) for number in share.split("/"))
    parts = split(
        examples.targets.numpy(),
        parties=parties,
        scheme=partition.scheme,
        seed=partition.seed,
        alpha=partition.alpha,
        shards_per_party=partition.shards_per_party,
        sizes=partition.sizes,
    )
    return examples.take(torch.from_numpy(parts[index - 1]))


def built_evaluator(settings: Settings, connect: Connect, *, observer: EvaluatorObserver | None = None) -> Evaluator:
    """Raises ConfigurationError, DataError."""
    task = task_of(settings)
    examples = task.test_examples(settings.task.data)
    module, manifest, model = _initial(settings, task)
    device = choose_device(settings.evaluation.device)

    def evaluate_here(model: Vector) -> Score:
        load_vector(module, model, manifest)
        found = evaluate(task, module, examples, device=device, batch_size=settings.evaluation.batch_size)
        return Score(found.accuracy, found.loss, found.count)

    return Evaluator(
        connect,
        evaluate_here,
        federation=settings.federation.name,
        manifest=manifest,
        initial=model,
        federation_key=federation_key(settings),
        clock=time.time,
        observer=observer,
    )


def federation_key(settings: Settings) -> str | None:
    """The public key that frames have to be signed by; None where no signatures are asked for. Raises ConfigurationError."""
    if not settings.security.signatures:
        return None
    if settings.security.aggregator_key is not None:
        return settings.security.aggregator_key
    if not settings.key_file.exists():
        raise ConfigurationError(
            "frames are signed, and there is no key to check them by: use a party file (--enrolment NAME.toml), or give the "
            "federation's public key by [security] aggregator_key (`broker-fl party key` prints it)"
        )
    return load_key(settings.key_file).public


def _party_key(settings: Settings) -> SigningKey | None:
    if not settings.security.signatures:
        return None
    if settings.security.party_key is None:
        raise ConfigurationError(
            "updates are signed, and this party has no key: use its party file (--enrolment NAME.toml, from `broker-fl party "
            "add` or `party rotate`); a federation without signatures says so by --set security.signatures=false, on all sides"
        )
    return key_of(settings.security.party_key.get_secret_value(), what="[security] party_key")


def use_threads(settings: Settings) -> None:
    if settings.worker.threads is not None:
        torch.set_num_threads(settings.worker.threads)
