"""Does differential privacy protect? Attacks on models and updates of the worker's own training, with DP-SGD and without.

1. Membership inference: from a model that has learnt its examples by heart, and from ones with epsilon 8, 2 and 1, whether an
   example was among them; beside it the most that (epsilon, delta) leaves to any attack.
2. Inversion: the image, out of one update from it.
3. Canaries: what a party's updates give away together, against what the accountant claims of them, and against the claim of one
   that starts anew with each training.

    python -m benchmarks.attack --data FOLDER [--json FILE] [--seed N] [--images FOLDER]     (FOLDER holds FashionMNIST/raw)
    python -m benchmarks.attack --quick     (digits; fewer models, images and canaries)

Where there is no Fashion-MNIST, the digits are attacked. The exit code is 1 where a claim fails.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.attack import canaries, inversion, membership
from benchmarks.attack.canaries import CanaryRow
from benchmarks.attack.inversion import InversionRow
from benchmarks.attack.membership import MembershipRow
from benchmarks.attack.subject import Subject, subject
from benchmarks.report import machine, parser, show
from broker_fl.errors import DataError
from broker_fl.privacy.policy import Mechanism

Row = MembershipRow | InversionRow | CanaryRow

EPSILONS = (None, 8.0, 2.0, 1.0)
MECHANISMS = (
    Mechanism(noise_multiplier=4.0, sample_rate=1.0, steps=1, max_grad_norm=1.0, clipping="flat"),
    Mechanism(noise_multiplier=4.0, sample_rate=0.25, steps=16, max_grad_norm=1.0, clipping="ghost"),
)
TRAININGS = (1, 4, 16, 64)

HIDDEN = ("low", "tpr_low", "tpr_high", "tpr_bound", "noise_multiplier", "pool", "forgetful_bound", "clipping", "steps")
"""From the screen: what is in the file besides."""

WORKS, HARMLESS = 0.2, 0.15
"""Advantages: of an attack that clearly works, and of one that hardly does."""
RECOGNISED = 0.9
"""Correlation with the true image."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    tasks: tuple[str, ...]
    """The first one whose data can be had."""
    pool: int
    epochs: int
    models: int
    images: int
    canaries: int
    epsilons: tuple[float | None, ...] = EPSILONS


FULL = Size(("fashion_mnist", "digits"), pool=1000, epochs=40, models=32, images=200, canaries=4000)
QUICK = Size(("digits",), pool=400, epochs=40, models=10, images=40, canaries=2000)


def subject_of(size: Size, data: Path | None) -> Subject:
    *better, last = size.tasks
    for name in better:
        try:
            return subject(name, data, pool=size.pool, epochs=size.epochs)
        except DataError as exc:
            print(f"{name} is left out: {exc}")
    return subject(last, None, pool=size.pool, epochs=size.epochs)


def claims(
    members: Sequence[MembershipRow], images: Sequence[InversionRow], trainings: Sequence[CanaryRow]
) -> list[tuple[bool, str]]:
    """What the rows should show, and whether they do."""
    plain = max(row.low for row in members if row.epsilon is None)
    private = [row for row in members if row.epsilon is not None]
    worst = max(row.high for row in private)
    seen = next(row.correlation for row in images if row.epsilon is None)
    blind = next(row.correlation for row in images if row.attack == inversion.BASELINE)
    noised = max(row.correlation for row in images if row.noise_multiplier is not None)
    caught = [row for row in trainings if row.at_least > row.forgetful_epsilon]
    most, claimed = max(row.at_least for row in trainings), max(row.forgetful_epsilon for row in trainings)
    kinds = {(row.clipping, row.sample_rate) for row in trainings}
    return [
        (plain > WORKS, f"without DP, membership inference works: advantage above {plain:.2f}"),
        (worst < HARMLESS, f"with DP it hardly does: advantage below {worst:.2f}"),
        (
            all(row.low <= row.tightest_bound and row.tpr_low <= row.tpr_bound for row in private),
            "no attack passes what (epsilon, delta) leaves to it",
        ),
        (seen > RECOGNISED, f"without DP, one update shows its image: correlation {seen:.3f}"),
        (noised < blind, f"with DP it shows less than the mean image does: {noised:.2f}, {blind:.2f}"),
        (
            {(row.clipping, row.sample_rate) for row in caught} == kinds and all(row.trainings > 1 for row in caught),
            f"an accountant that forgets is caught: epsilon is at least {most:.2f}, where it claims {claimed:.2f}",
        ),
        (all(row.at_least <= row.epsilon for row in trainings), "the accountant that composes is nowhere contradicted"),
    ]


def run(size: Size, data: Path | None, *, seed: int, folder: Path | None, shows: Callable[[str, Sequence[Row]], None]) -> bool:
    """Whether all claims hold."""
    of = subject_of(size, data)
    members = membership.measure(of, size.epsilons, models=size.models, seed=seed)
    shows("Membership inference", members)
    images = inversion.measure(of.name, of.data, size.epsilons, images=size.images, seed=seed, folder=folder)
    shows("Inversion of one update", images)
    trainings = [
        row for each in MECHANISMS for row in canaries.audit(each, trainings=TRAININGS, canaries=size.canaries, seed=seed)
    ]
    shows("Trainings in a row, audited by canaries", trainings)
    found = claims(members, images, trainings)
    for holds, claim in found:
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    return all(holds for holds, _ in found)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--data", type=Path, help="folder with FashionMNIST/raw")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--quick", action="store_true", help="less of everything, in half a minute")
    arguments.add_argument("--images", type=Path, metavar="FOLDER", help="draw true and reconstructed images into it")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), list[Row]()

    def shows(title: str, some: Sequence[Row]) -> None:
        show(title, some, json_file=None, hidden=HIDDEN)
        rows.extend(some)

    holds = run(QUICK if given.quick else FULL, given.data, seed=given.seed, folder=given.images, shows=shows)
    if given.json is not None:
        record = {
            "machine": machine(),
            "seed": given.seed,
            "seconds": time.monotonic() - began,
            "rows": [asdict(row) for row in rows],
        }
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
