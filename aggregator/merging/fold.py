"""What a merging strategy folds over: states, contributions, outcomes, and the interface of the fold.

`apply` is deterministic: the same state and the same contributions in the same order give the same bits, which is what replay
rests on. It takes over the state's arrays: who called it goes on with the returned state only.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from broker_fl.codecs.delta import Delta
from broker_fl.parameters import Vector


@dataclass(frozen=True, slots=True)
class Contribution:
    """An admitted update."""

    party: str
    delta: Delta
    base_version: int
    num_samples: int
    factor: float = 1.0
    """What trust leaves of it: the delta is merged so many times, 0 < factor <= 1."""
    is_void: bool = False
    """Keeps its place in the order, and adds nothing: for the model as if its party had never taken part."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """What was accepted and not merged yet."""

    total: Vector
    """The weighted sum of the deltas, shape (n,)."""
    weight: float
    parties: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    version: int
    model: Vector
    buffer: Buffer | None = None
    bases: dict[int, Vector] = field(default_factory=dict)
    """The broadcast models by version, kept only where the strategy needs them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Literal["merged", "buffered"]
    staleness: int
    weight: float
    """The factor of the delta: a_t where it is merged alone, its share before averaging where it is buffered."""


class Strategy(Protocol):
    @property
    def max_staleness(self) -> int:
        """In versions; later updates are not admitted."""

    @property
    def keeps_bases(self) -> bool:
        """Whether `apply` needs the model that a contribution started from."""

    @property
    def one_per_version(self) -> bool:
        """Whether a party may contribute once to each version only, and every version is broadcast at once."""

    @property
    def one_per_buffer(self) -> bool:
        """Whether a party may have one contribution in a buffer only."""

    @property
    def may_repeat(self) -> bool:
        """Whether a party may train from one version more than once."""

    def init(self, model: Vector) -> State: ...

    def apply(self, state: State, contribution: Contribution) -> tuple[State, Outcome]: ...

    def flush(self, state: State) -> State:
        """Merges a buffer as it is; the same state if it is empty."""


def remember_base(strategy: Strategy, state: State, *, broadcast: Vector) -> State:
    """The state after a broadcast of its version: with the base that contributions will name, without those out of bounds."""
    if not strategy.keeps_bases:
        return state
    oldest = state.version - strategy.max_staleness
    bases = {version: base for version, base in state.bases.items() if version >= oldest}
    return replace(state, bases={**bases, state.version: broadcast})
