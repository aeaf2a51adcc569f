"""Error feedback: what a codec leaves out is kept and sent later (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2).

target = delta + residual; send C(target); residual' = target - C(target).

With momentum correction (Deep Gradient Compression, Lin et al. 2018, equation 7), deltas that wait gather momentum as they would
have in a dense run, and what was sent starts anew (momentum factor masking, section 3.2):

velocity' = m velocity + delta; target = velocity' + residual; send C(target); residual' = target - C(target);
velocity' = 0 where C(target) has an element.
"""

import numpy as np

from broker_fl.codecs.delta import Delta
from broker_fl.parameters import Vector


def compensate(delta: Vector, residual: Vector | None) -> Vector:
    return delta if residual is None else delta + residual


def corrected(
    delta: Vector, residual: Vector | None, velocity: Vector | None, *, momentum: float
) -> tuple[Vector, Vector | None]:
    """The target and the velocity, new ones; without momentum the target is `compensate`'s, and there is no velocity.

    Without a residual and a velocity, both start at zero.
    """
    if not momentum:
        return compensate(delta, residual), None
    moved = delta.copy() if velocity is None else velocity * np.float32(momentum) + delta
    return moved.copy() if residual is None else moved + residual, moved


def left_over(target: Vector, sent: Delta) -> Vector:
    """The next residual; takes the memory of `target`."""
    sent.subtract_from(target)
    return target


def masked(velocity: Vector | None, sent: Delta) -> Vector | None:
    """The next velocity; takes its memory. A dense payload sends something of every element, and masks none."""
    if velocity is not None and sent.indices is not None:
        velocity[sent.indices] = 0
    return velocity


def give_back(residual: Vector, refused: Delta) -> Vector:
    """A refused update's content returns to the residual; takes its memory."""
    refused.add_to(residual)
    return residual
