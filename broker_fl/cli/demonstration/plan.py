"""What a demo is asked to show, and the settings that follow from it."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from broker_fl.cli.options import Flags

DIGITS_TRAINING = {"epochs": 5}
NOISED_DIGITS_TRAINING = {"epochs": 1, "batch_size": 128, "learning_rate": 0.5}
"""Large samples and few steps: what learns most for its epsilon."""
VERSIONS_PER_PARTY = 30
SLOW_THROTTLE = 4.0


@dataclass(frozen=True, slots=True)
class Demo:
    parties: int
    versions: int | None
    seconds: float | None
    steady: bool
    keep: bool
    scheme: str
    """How the data is dealt out: iid, dirichlet or shards."""
    folder: Path
    flags: Flags
    """The settings that the user gave."""
    epsilon: float | None = None
    """What each party may spend on its examples; None for no differential privacy."""
    tls: bool = False
    """Everyone logs in by a certificate, over TLS."""
    prefix: str = ""
    """Of the parties' names, on a broker that others use too."""

    @property
    def names(self) -> tuple[str, ...]:
        width = len(str(self.parties))
        return tuple(f"{self.prefix}party-{number:0{width}d}" for number in range(1, self.parties + 1))

    @property
    def late(self) -> str | None:
        """Comes when the others are well under way."""
        return None if self.steady or self.parties < 2 else self.names[-1]

    @property
    def killed(self) -> str | None:
        """Is killed in the middle, and comes back."""
        return None if self.steady or self.parties < 3 else self.names[1]

    @property
    def slow(self) -> str | None:
        return None if self.steady or self.parties < 4 else self.names[2]

    @property
    def goal_versions(self) -> int | None:
        """Unless a time was given, there is one."""
        if self.versions is None and self.seconds is None:
            return VERSIONS_PER_PARTY * self.parties
        return self.versions

    def settings(self, *, federation: str) -> Flags:
        """For all of its processes; what the user set wins."""
        threads = max(1, (os.cpu_count() or 1) // self.parties)
        flags: Flags = {
            "federation": {"name": federation},
            "partition": {"scheme": self.scheme},
            "merging": {"mixing_rate": mixing_rate_for(self.parties)},
            "aggregator": {"state": str(self.folder / "aggregator"), "versions": self.goal_versions, "seconds": self.seconds},
            "worker": {"state": str(self.folder / "workers"), "threads": threads},
        }
        is_digits = self.flags.get("task", {}).get("name", "digits") == "digits"
        if self.epsilon is not None:
            flags["privacy"] = self._privacy(self.epsilon)
        if is_digits:
            flags["training"] = dict(DIGITS_TRAINING if self.epsilon is None else NOISED_DIGITS_TRAINING)
        for section, keys in self.flags.items():
            flags.setdefault(section, {}).update(keys)
        return flags

    def _privacy(self, epsilon: float) -> dict[str, object]:
        """Enough trainings for each that those who are late, slow or killed can be waited for."""
        share = (self.goal_versions or VERSIONS_PER_PARTY * self.parties) / self.parties
        return {"mechanism": "dp-sgd", "target_epsilon": epsilon, "planned_trainings": math.ceil(1.5 * share)}

    def of_party(self, name: str) -> Flags:
        share = f"{self.names.index(name) + 1}/{self.parties}"
        return {"worker": {"party": name, "share": share, "throttle": SLOW_THROTTLE if name == self.slow else 1.0}}


def mixing_rate_for(parties: int) -> float:
    """With which one turn of all parties, each update staler than the one before, is a whole step: 1 / sum of (1 + t)^-1/2.

    A larger one overshoots, and running variances of BatchNorm are the first to suffer; 0.31 for 5 parties, 0.2 for 10.
    """
    return round(1.0 / sum(1.0 / math.sqrt(1 + staleness) for staleness in range(parties)), 2)


def merged(*layers: Flags) -> Flags:
    """Later layers win."""
    result: Flags = {}
    for layer in layers:
        for section, keys in layer.items():
            result.setdefault(section, {}).update({key: value for key, value in keys.items() if value is not None})
    return result
