"""Logistic regression on features, solved to its end: the linear probe before fine-tuning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxft.dataclass_checks import checked
from jaxft.errors import DataError, RecipeError

TOLERANCE = 1e-10
"""Of the gradient's norm, in coordinates in which the curvature is about 1."""
ITERATIONS = 1000
"""At most, for each strength."""


@checked()
@dataclass(frozen=True)
class LogisticRegression:
    """In the place of a head's learning rate: the stage solves the head, and takes no steps.

    Attributes:
      c: inverse strengths of the L2 penalty, as scikit-learn's `C`, of which the best by validation
        is taken: by accuracy, then loss, then the stronger penalty. The default is the range of
        Kumar et al. 2022 (arXiv:2202.10054), whose code tries 100 values of it.
    """

    c: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.c or not all(0 < c < math.inf for c in self.c):
            raise RecipeError(
                f"LogisticRegression: c is {self.c}; it must be one or more positive numbers."
            )


class Fit(NamedTuple):
    """A linear layer that minimises the penalised loss; float64."""

    c: float
    kernel: np.ndarray
    """[d k]."""
    bias: np.ndarray
    """[k]."""
    iterations: int
    gradient_norm: float

    @property
    def converged(self) -> bool:
        """Whether the gradient's norm is at most `TOLERANCE`, or `ITERATIONS` were too few."""
        return self.gradient_norm <= TOLERANCE


def logistic_regression(
    features: ArrayLike, targets: ArrayLike, num_classes: int, *, c: Sequence[float] = (1.0,)
) -> tuple[Fit, ...]:
    """Fits features [n d] to classes int [n], once for each inverse strength of the penalty.

    The minimum, in float64, of `c * (sum of cross entropies) + |kernel|^2 / 2`: the problem of
    scikit-learn's `LogisticRegression`. Of two classes that solves for one vector v and penalises
    |v|^2 / 2. The same function is here kernel = (-v/2, v/2), of which |kernel|^2 is |v|^2 / 2: so
    for two classes the penalty is |kernel|^2, and `kernel[:, 1] - kernel[:, 0]` is v.

    Classes are those that occur. One that does not has no minimum (its bias falls for ever): it
    gets no kernel, and the bias that gives it at most 1 / (n + 2) of any image, as Laplace's rule.

    Fits are in the order of `c`, each started from that of the next stronger penalty. It takes
    memory for 3 float64 copies of the features, on the default device.

    Raises DataError for shapes or classes that do not fit, and features that are not finite;
    RecipeError for `c` that is empty or not positive.

    >>> fit, = logistic_regression([[0.0], [1.0], [3.0], [4.0]], [0, 0, 1, 1], 2)
    >>> fit.converged, (np.array([[1.0], [3.0]]) @ fit.kernel + fit.bias).argmax(1).tolist()
    (True, [0, 1])
    """
    LogisticRegression(tuple(c))  # its check
    rows, classes = np.asarray(features, np.float64), np.asarray(targets)
    _check(rows, classes, num_classes)
    present, own = np.unique(classes, return_inverse=True)
    n, k = len(rows), len(present)
    mean = rows.mean(0)
    fits = {}
    with jax.enable_x64(True):
        # A bias that is free of penalty lets the features be centred, and a penalty that is the
        # same in all directions lets them be turned: to axes along which they are uncorrelated,
        # of which there are no more than images.
        left, sizes, axes = jnp.linalg.svd(rows - mean, full_matrices=False)
        turned = jnp.append(left * sizes, jnp.ones((n, 1)), axis=1)
        weights = jnp.zeros((turned.shape[1], k))
        for strength in sorted(set(c)):
            penalty = (2 if k == 2 else 1) / (strength * n)
            # Scaled by the root of the curvature along them, that of where it starts, the problem
            # is nearly round, however ill-conditioned the features are.
            shares = jax.nn.softmax(turned @ weights)
            spread = (shares * (1 - shares)).mean(1)
            curvature = (spread @ turned**2 / n).at[:-1].add(penalty)
            # Where it is less, the gradient's rounding would be magnified to the tolerance.
            scale = jnp.maximum(curvature, TOLERANCE) ** -0.5
            weights, norm, iterations = _minimise(turned, own, penalty, scale, weights)
            kernel = np.asarray(axes.T @ weights[:-1])
            bias = np.asarray(weights[-1]) - mean @ kernel
            layer = _with_absent(rows, present, kernel, bias - bias.mean(), num_classes)
            fits[strength] = Fit(strength, *layer, int(iterations), float(norm))
    return tuple(fits[strength] for strength in c)


@jax.jit
def _minimise(
    rows: jax.Array, targets: jax.Array, penalty: float, scale: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights [d k], of which the last row is the bias; the gradient's norm; iterations."""
    scale = scale[:, None]

    def objective(point: jax.Array) -> jax.Array:
        weights = scale * point
        losses = optax.softmax_cross_entropy_with_integer_labels(rows @ weights, targets)
        return losses.mean() + penalty / 2 * jnp.sum(weights[:-1] ** 2)

    solver = optax.lbfgs(
        linesearch=optax.scale_by_zoom_linesearch(30, initial_guess_strategy="one")
    )
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(at: tuple) -> tuple:
        point, state, _, iterations = at
        value, gradient = value_and_grad(point, state=state)
        updates, state = solver.update(
            gradient, state, point, value=value, grad=gradient, value_fn=objective
        )
        norm = jnp.linalg.norm(optax.tree.get(state, "grad"))
        return optax.apply_updates(point, updates), state, norm, iterations + 1

    point = start / scale
    norm = jnp.linalg.norm(jax.grad(objective)(point))
    point, _, norm, iterations = jax.lax.while_loop(
        lambda at: (at[2] > TOLERANCE) & (at[3] < ITERATIONS),
        step,
        (point, solver.init(point), norm, jnp.array(0)),
    )
    return scale * point, norm, iterations


def _with_absent(
    rows: np.ndarray, present: np.ndarray, kernel: np.ndarray, bias: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The layer of all classes, given that of those which occur."""
    logits = rows @ kernel + bias
    rare = np.logaddexp.reduce(logits, axis=1).min() - math.log(len(rows) + 1)
    whole, biases = np.zeros((len(kernel), num_classes)), np.full(num_classes, rare)
    whole[:, present], biases[present] = kernel, bias
    return whole, biases


def _check(rows: np.ndarray, classes: np.ndarray, num_classes: int) -> None:
    if rows.ndim != 2 or classes.shape != rows.shape[:1] or not rows.size:
        raise DataError(
            f"features are {list(rows.shape)} and targets {list(classes.shape)}; they must be "
            "[n d] and [n], and not empty."
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise DataError(
            f"targets are from {classes.min()} to {classes.max()}; {num_classes} classes are "
            f"numbered from 0 to {num_classes - 1}."
        )
    if not np.isfinite(rows).all():
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        raise DataError(
            f"{len(wrong)} of {len(rows)} rows of features are not finite, such as row {wrong[0]}: "
            "the network makes NaN or infinity of them."
        )
