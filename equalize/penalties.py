"""Penalties of a group, cut into shares, as pure functions of tensors.

A penalty P(w_1, ..., w_n) reaches Keras as one share a member, through that member's regularizer. Every share is
computed from the member itself and a statistic of the whole group that carries no gradient, so that the shares add up
to P while the gradient of share i with respect to w_i is the full ∂P/∂w_i and no gradient reaches another member.
"""

from equalize import backend
from equalize.projections import Tensor


def squared_distance(w: Tensor, center: Tensor) -> Tensor:
    """‖w − center‖², a scalar.

    With the mean as `center` it is w's share of P = Σ‖w_i − mean‖²: since Σ(w_i − mean) = 0, what would flow through
    the mean cancels and 2·(w_i − mean) is all of ∂P/∂w_i.
    """
    return backend.sum_of_squares(w - center)
