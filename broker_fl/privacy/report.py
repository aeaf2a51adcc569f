"""What a party can show: what was promised, what was done, what it cost. Pure: the same record gives the same bytes."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from broker_fl.errors import PrivacyError
from broker_fl.privacy.accounting import Accountant, History, composed, epsilon_of, total
from broker_fl.privacy.record import Promise, Training

ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv", "gdp")
_MOST_PRV_POINTS = 12
"""Of the plot: this accountant takes up to seconds for each."""

UNIT = "one example: with or without any one of them, what left the party is nearly as likely (neighbours differ by one example)"

ASSUMED = (
    "Every training on these examples of which anything left is in this record; other federations' workers name the same file.",
    "A person is one example. Who is in k of them is protected k times less: k * epsilon, and a larger delta.",
    "Each step's examples are drawn by Poisson sampling at the sample rate, by a secret key of the operating system.",
    "The model and the task's preparation treat each example by itself; BatchNorm is replaced, Opacus checks the rest.",
    "Noise is Gaussian in floating point, by a Philox generator with a key of 128 bits; it is not proven to be cryptographic.",
    "The number of examples is public: the sample rate is made of it, and each update says it.",
)

NOT_COVERED = (
    "What else is published of these examples: statistics, models trained elsewhere, choices made by looking at them.",
    "The loss and other figures in the worker's own log, which stays with the party.",
    "That the party takes part, when, how often, and for how long each training takes.",
    "Held-out data on which versions are evaluated.",
    "A machine of the party that is broken into: the examples lie there.",
)


@dataclass(frozen=True, slots=True)
class Cost:
    """By one accountant; no epsilon, and why, where it has no answer."""

    accountant: Accountant
    epsilon: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """Epsilon after a training, by an upper bound."""

    number: int
    at: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class Report:
    party: str
    record: str
    """The id of the record."""
    delta: float
    trainings: tuple[Training, ...]
    promises: tuple[Promise, ...]
    costs: tuple[Cost, ...]
    """Of all trainings together."""
    costs_by_federation: dict[str, tuple[Cost, ...]]
    rdp: tuple[Point, ...]
    """After each training."""
    prv: tuple[Point, ...]
    """After some of them."""
    unit: str = UNIT
    assumed: tuple[str, ...] = ASSUMED
    not_covered: tuple[str, ...] = NOT_COVERED


def report_of(
    trainings: Sequence[Training], promises: Sequence[Promise], *, party: str, record: str, delta: float | None = None
) -> Report:
    """At the delta that is given, or else that of the last limits of this party, or else 1e-5."""
    if delta is None:
        limits = [json.loads(one.limits) for one in promises if one.party == party]
        delta = float(limits[-1].get("delta", 1e-5)) if limits else 1e-5
    federations = sorted({training.federation for training in trainings})
    return Report(
        party=party,
        record=record,
        delta=delta,
        trainings=tuple(trainings),
        promises=tuple(promises),
        costs=_costs(trainings, delta),
        costs_by_federation={name: _costs([one for one in trainings if one.federation == name], delta) for name in federations},
        rdp=_points(trainings, range(len(trainings)), delta, "rdp"),
        prv=_points(trainings, _some(len(trainings)), delta, "prv"),
    )


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _costs(trainings: Sequence[Training], delta: float) -> tuple[Cost, ...]:
    history = composed(training.cost for training in trainings)
    return tuple(_cost(history, delta, accountant) for accountant in ACCOUNTANTS)


def _cost(history: History, delta: float, accountant: Accountant) -> Cost:
    try:
        epsilon = epsilon_of(history, delta=delta, accountant=accountant)
    except PrivacyError as exc:
        return Cost(accountant, None, str(exc))
    return Cost(accountant, epsilon) if math.isfinite(epsilon) else Cost(accountant, None, "no bound: there was next to no noise")


def _some(count: int) -> Sequence[int]:
    """Up to so many of the trainings, the first and the last among them."""
    if count <= _MOST_PRV_POINTS:
        return range(count)
    step = (count - 1) / (_MOST_PRV_POINTS - 1)
    return [round(step * position) for position in range(_MOST_PRV_POINTS)]


def _points(trainings: Sequence[Training], wanted: Sequence[int], delta: float, accountant: Accountant) -> tuple[Point, ...]:
    """Where the accountant has no answer there is no point; the costs say why."""
    points: list[Point] = []
    history: History = {}
    chosen = set(wanted)
    for position, training in enumerate(trainings):
        history = total(history, training.cost)
        cost = _cost(history, delta, accountant) if position in chosen else None
        if cost is not None and cost.epsilon is not None:
            points.append(Point(position + 1, training.at, cost.epsilon))
    return tuple(points)
