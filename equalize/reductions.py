"""Reductions: what becomes of the gradients of tied variables, for `equalize.optimizers.TiedOptimizer`.

Who shares one variable sees the sum of the gradients of its uses. Separate variables have a gradient each, from one
backward pass, and `PCGrad`, `MGDA` and `UPGrad` make of them an update that no use has to pay for. Subclass `Reduction`
for another: it is given the Gram matrix of the gradients, and returns their weights.
"""

import abc
import random
from typing import Any

import keras
from keras import ops

from equalize import _backend as backend
from equalize._backend import Tensor
from equalize._inputs import arguments
from equalize._math import definite

__all__ = ["MGDA", "PCGrad", "Reduction", "UPGrad"]


class Reduction(abc.ABC):
    """Base of the reductions: write `weights`, and the update is Σᵢ weightsᵢ · gᵢ.

    Use i of some weights is member i of every group that one `tie` of layers made, so its gradient gᵢ is one vector
    over all of them; of a group that was tied by itself each member is a use. Through views it is the gradient of the
    common value. Uses without a gradient in a step, such as frozen ones, are left out of it.

    There is one backward pass, and beside the gradients no more memory than n² numbers. What papers say of losses is
    true where use i feeds loss i alone, as with one tower, trunk or adapter for each task. Where uses follow one
    another, as tied blocks of a transformer do, all of them have one loss, and their gradients are its parts.

    Replicas of a distribution agree on the gradients before they are weighed. Under gradient accumulation the gradients
    of each small step are weighed by themselves.

    A subclass with arguments adds them to `get_config`. Register it with Keras to save and load it.

    Attributes:
        step: While `weights` runs: how many updates the optimizer has made, an integer tensor of shape `()`.

    Example:
    >>> import keras, equalize
    >>> from keras import ops
    >>> @keras.saving.register_keras_serializable()
    ... class EqualNorms(equalize.reductions.Reduction):
    ...     def weights(self, gramian):
    ...         return 1.0 / ops.sqrt(ops.diagonal(gramian) + 1e-12)
    >>> layers = [keras.layers.Dense(2) for _ in range(2)]
    >>> built = [layer.build((None, 4)) for layer in layers]
    >>> registry = equalize.GroupRegistry()
    >>> groups = registry.tie("trunk", layers, equalize.constraints.Equal())
    >>> optimizer = equalize.optimizers.TiedOptimizer("sgd", registry, reduction=EqualNorms())
    """

    step: Tensor = 0

    @abc.abstractmethod
    def weights(self, gramian: Tensor) -> Tensor:
        """The weights of the uses' gradients.

        Args:
            gramian: The inner products ⟨gᵢ, gⱼ⟩ of the gradients, float32 of shape `(n, n)`.

        Returns:
            Numbers of shape `(n,)`. They must not depend on Python's control flow over the values, since the step is
            compiled.
        """

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Reduction":
        return cls(**config)

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({given})"


@keras.saving.register_keras_serializable(package="equalize")
class PCGrad(Reduction):
    """Takes from each gradient what conflicts with another, and adds up: projecting conflicting gradients.

    Each gᵢ meets the others in random order, and where it points against gⱼ, that is ⟨gᵢ, gⱼ⟩ < 0, it loses its part
    along gⱼ. Gradients that do not conflict are summed as they are. Elsewhere this takes a backward pass for each
    task; here it takes one, and n³ operations on the Gram matrix.

    Args:
        seed: Where the orders come from, which are other ones in every step; None for a random seed. It is saved.

    Raises:
        TypeError: `seed` is not an integer.
        EqualizeError: `seed` is negative or above 2³¹ − 1.

    Example:
    >>> import numpy as np, equalize
    >>> from keras import ops
    >>> gramian = ops.convert_to_tensor(np.array([[1.0, -1.0], [-1.0, 4.0]], "float32"))
    >>> ops.convert_to_numpy(equalize.reductions.PCGrad(seed=0).weights(gramian)).tolist()
    [2.0, 1.25]

    Reference:
        Yu, Kumar, Gupta, Levine, Hausman and Finn, Gradient surgery for multi-task learning (2020), algorithm 1.
    """

    def __init__(self, seed: int | None = None):
        seed = random.randrange(2**31) if seed is None else seed  # which `keras.utils.set_random_seed` seeds
        self.seed = arguments.integer("seed", seed, low=0)

    def weights(self, gramian: Tensor) -> Tensor:
        n = gramian.shape[0]
        orders = ops.argsort(backend.stateless_uniform((n, n), self.seed, self.step), axis=1)
        own = ops.eye(n, dtype=gramian.dtype)

        def meet(k: Tensor, parts: Tensor) -> Tensor:
            others = ops.one_hot(ops.take(orders, k, axis=1), n, dtype=gramian.dtype)  # the k-th that each one meets
            along = ops.sum(backend.product(parts, gramian) * others, axis=1)
            squares = ops.sum(others * ops.diagonal(gramian), axis=1)
            itself = ops.sum(others * own, axis=1) > 0.0
            conflict = ops.logical_and(along < 0.0, ops.logical_and(squares > 0.0, ops.logical_not(itself)))
            lost = ops.where(conflict, along / ops.where(squares > 0.0, squares, 1.0), 0.0)
            return parts - ops.expand_dims(lost, 1) * others

        return ops.sum(ops.fori_loop(0, n, meet, own), axis=0)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed}


@keras.saving.register_keras_serializable(package="equalize")
class MGDA(Reduction):
    """Takes the shortest convex combination of the gradients: multiple gradient descent.

    The weights solve argmin over α of ‖Σᵢ αᵢ·gᵢ‖² with αᵢ ≥ 0 and Σᵢ αᵢ = 1. A small step along it lessens the loss of
    every use, and at a Pareto stationary point it is 0. Long gradients get small weights, so the use with the shortest
    one decides. Since the weights sum to 1, it is of the size of the mean, not of the sum.

    The quadratic program is solved exactly, up to rounding, for a Gram matrix with 10⁻⁴ of its mean diagonal added to
    its diagonal.

    Example:
    >>> import numpy as np, equalize
    >>> from keras import ops
    >>> gramian = ops.convert_to_tensor(np.array([[1.0, 0.0], [0.0, 3.0]], "float32"))
    >>> ops.convert_to_numpy(equalize.reductions.MGDA().weights(gramian)).astype("float64").round(3).tolist()
    [0.75, 0.25]

    Reference:
        Désidéri, Multiple-gradient descent algorithm for multiobjective optimization (2012); Sener and Koltun,
        Multi-task learning as multi-objective optimization (2018), equation 3.
    """

    def weights(self, gramian: Tensor) -> Tensor:
        scaled, identity = _scaled(gramian)
        # With the constraint as another coordinate of each gradient, the sum of the weights comes out by itself.
        found = definite.nonnegative_minimum(scaled + 1.0 + 1e-4 * identity, ops.ones((1, gramian.shape[0])))[0]
        return found / ops.sum(found)


@keras.saving.register_keras_serializable(package="equalize")
class UPGrad(Reduction):
    """Projects each gradient onto what conflicts with none, and averages: unconflicting projection of gradients.

    Of every gᵢ the nearest vector is taken that has a non-negative inner product with all gradients, and the mean of
    these is the update. A small step along it lessens the loss of every use. It is linear under scaling of each
    gradient, so uses with large gradients keep their say; where no two conflict, it is the mean.

    Its weights are the mean over i of argmin over v ≥ eᵢ of vᵀGv. The quadratic programs are solved exactly, up to
    rounding, for a Gram matrix divided by its trace with 10⁻⁴ added to its diagonal, as in the authors' library.

    Example:
    >>> import numpy as np, equalize
    >>> from keras import ops
    >>> gramian = ops.convert_to_tensor(np.array([[1.0, -1.0], [-1.0, 4.0]], "float32"))
    >>> ops.convert_to_numpy(equalize.reductions.UPGrad().weights(gramian)).astype("float64").round(1).tolist()
    [1.0, 0.6]

    Reference:
        Quinton and Rey, Jacobian descent for multi-objective optimization (2024), section 3.
    """

    def weights(self, gramian: Tensor) -> Tensor:
        n = gramian.shape[0]
        scaled, identity = _scaled(gramian)
        regular = scaled + 1e-4 * n * identity
        found = identity + definite.nonnegative_minimum(regular, -regular)  # v = eᵢ + x
        return ops.sum(found, axis=0) / n


def _scaled(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram matrix with a mean diagonal of 1, unless it is 0, and the identity.

    A solver of some backends raises on what is not finite; that shows in the update all the same.
    """
    n = gramian.shape[0]
    mean = ops.sum(ops.diagonal(gramian)) / n
    usable = ops.logical_and(ops.all(ops.isfinite(gramian)), mean > 0.0)
    scaled = ops.where(usable, gramian, 0.0) / ops.where(usable, mean, 1.0)
    return scaled, ops.eye(n, dtype=gramian.dtype)
