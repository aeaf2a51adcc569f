"""Error feedback: what a codec leaves out is kept and sent later (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2).

target = delta + residual; send C(target); residual' = target - C(target).
"""

from broker_fl.codecs.delta import Delta
from broker_fl.parameters import Vector


def compensate(delta: Vector, residual: Vector | None) -> Vector:
    return delta if residual is None else delta + residual


def left_over(target: Vector, sent: Delta) -> Vector:
    """The next residual; takes the memory of `target`."""
    sent.subtract_from(target)
    return target


def give_back(residual: Vector, refused: Delta) -> Vector:
    """A refused update's content returns to the residual; takes its memory."""
    refused.add_to(residual)
    return residual
