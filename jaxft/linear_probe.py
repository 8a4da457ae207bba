"""Linear probe: logistic regression on fixed features, solved to convergence with L-BFGS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float, Float64, Int

from jaxft.dataclass_checks import checked
from jaxft.errors import DataError, RecipeError

TOLERANCE = 1e-10
"""Maximum gradient norm at convergence, in coordinates with curvature of about 1."""
ITERATIONS = 1000
"""Maximum number of iterations for each strength."""


@checked()
@dataclass(frozen=True)
class LinearProbe:
    """Solves the head by logistic regression; stands in `Stage.train` for a learning rate.

    The stage solves once for each strength and keeps the best by validation: by accuracy, then
    loss, then the stronger penalty.

    Attributes:
      c: inverse strengths of the L2 penalty, as scikit-learn's `C`. The default spans the range of
        Kumar et al. 2022 (arXiv:2202.10054), whose code tries 100 values.
    """

    c: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.c or not all(0 < c < math.inf for c in self.c):
            raise RecipeError(
                f"LinearProbe: c is {self.c}; it must be one or more positive numbers."
            )


class Fit(NamedTuple):
    """A linear layer that minimises the penalised loss."""

    c: float
    """Inverse strength of the penalty."""
    kernel: Float64[np.ndarray, "d k"]
    bias: Float64[np.ndarray, " k"]
    iterations: int
    """Number of iterations taken."""
    gradient_norm: float
    """Norm of the gradient after the last iteration."""

    @property
    def converged(self) -> bool:
        """True if the gradient's norm is at most `TOLERANCE` after at most `ITERATIONS`."""
        return self.gradient_norm <= TOLERANCE


def logistic_regression(
    features: Float[ArrayLike, "n d"],
    targets: Int[ArrayLike, " n"],
    num_classes: int,
    *,
    c: Sequence[float] = (1.0,),
) -> tuple[Fit, ...]:
    """Fits a linear classifier to features, once for each inverse strength of the penalty.

    Minimises `c * (sum of cross entropies) + |kernel|^2 / 2` in float64, the same problem as
    scikit-learn's `LogisticRegression`. For two classes, scikit-learn solves for one vector v with
    the penalty |v|^2 / 2. Here that function is kernel = (-v/2, v/2), whose squared norm is
    |v|^2 / 2; hence the penalty is |kernel|^2, and v is `kernel[:, 1] - kernel[:, 0]`.

    For a class without examples there is no minimum, because its bias falls without bound. It gets
    a zero kernel and a bias that gives it a probability of at most 1 / (n + 2) on every example,
    as Laplace's rule of succession.

    Needs memory for 3 float64 copies of the features on the default device.

    Args:
      features: a row per example.
      targets: class of each example.
      num_classes: number of classes k.
      c: inverse strengths of the penalty. Each fit starts from the next stronger penalty.

    Returns:
      A fit for each entry of `c`, in its order.

    Raises:
      DataError: shapes or classes do not match, or features are not finite.
      RecipeError: `c` is empty or not positive.

    Example:
      >>> features = np.array([[0.0], [1.0], [3.0], [4.0]])
      >>> (fit,) = logistic_regression(features, np.array([0, 0, 1, 1]), 2)
      >>> fit.converged, (np.array([[1.0], [3.0]]) @ fit.kernel + fit.bias).argmax(1).tolist()
      (True, [0, 1])
    """
    LinearProbe(tuple(c))  # checks c
    features, targets = np.asarray(features, np.float64), np.asarray(targets)
    _check(features, targets, num_classes)
    present, present_targets = np.unique(targets, return_inverse=True)
    n, k = len(features), len(present)
    mean = features.mean(0)
    fits = {}
    with jax.enable_x64(True):
        # The bias has no penalty, so the features can be centred. The penalty is rotation-
        # invariant, so they can be rotated to uncorrelated axes: at most n of them.
        u, singular_values, axes = jnp.linalg.svd(features - mean, full_matrices=False)
        rotated = jnp.append(u * singular_values, jnp.ones((n, 1)), axis=1)
        weights = jnp.zeros((rotated.shape[1], k))
        for strength in sorted(set(c)):
            penalty = (2 if k == 2 else 1) / (strength * n)
            # Scaled by the root of the curvature at the start, the problem is nearly isotropic,
            # however ill-conditioned the features are.
            probabilities = jax.nn.softmax(rotated @ weights)
            variance = (probabilities * (1 - probabilities)).mean(1)
            curvature = (variance @ rotated**2 / n).at[:-1].add(penalty)
            # With a smaller curvature, the gradient's rounding error would exceed the tolerance.
            scale = jnp.maximum(curvature, TOLERANCE) ** -0.5
            weights, norm, iterations = _minimise(rotated, present_targets, penalty, scale, weights)
            kernel = np.asarray(axes.T @ weights[:-1])
            bias = np.asarray(weights[-1]) - mean @ kernel
            layer = _add_absent_classes(features, present, kernel, bias - bias.mean(), num_classes)
            fits[strength] = Fit(strength, *layer, int(iterations), float(norm))
    return tuple(fits[strength] for strength in c)


@jax.jit
def _minimise(
    rows: Float[jax.Array, "n r"],
    targets: Int[jax.Array, " n"],
    penalty: Float[ArrayLike, ""],
    scale: Float[jax.Array, " r"],
    start: Float[jax.Array, "r k"],
) -> tuple[Float[jax.Array, "r k"], Float[jax.Array, ""], Int[jax.Array, ""]]:
    """Minimises the penalised cross entropy with L-BFGS.

    Args:
      rows: rotated features with a last column of ones.
      targets: class of each row.
      penalty: factor of half the squared norm of the weights without bias.
      scale: scale of each row of weights, for conditioning.
      start: initial weights; the last row is the bias.

    Returns:
      Weights, the norm of the gradient and the number of iterations.
    """
    scale = scale[:, None]

    def objective(point: jax.Array) -> jax.Array:
        weights = scale * point
        losses = optax.softmax_cross_entropy_with_integer_labels(rows @ weights, targets)
        return losses.mean() + penalty / 2 * jnp.sum(weights[:-1] ** 2)

    solver = optax.lbfgs(
        linesearch=optax.scale_by_zoom_linesearch(30, initial_guess_strategy="one")
    )
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        point, state, _, iterations = carry
        value, gradient = value_and_grad(point, state=state)
        updates, state = solver.update(
            gradient, state, point, value=value, grad=gradient, value_fn=objective
        )
        norm = jnp.linalg.norm(optax.tree.get(state, "grad"))
        return optax.apply_updates(point, updates), state, norm, iterations + 1

    point = start / scale
    norm = jnp.linalg.norm(jax.grad(objective)(point))
    point, _, norm, iterations = jax.lax.while_loop(
        lambda carry: (carry[2] > TOLERANCE) & (carry[3] < ITERATIONS),
        step,
        (point, solver.init(point), norm, jnp.array(0)),
    )
    return scale * point, norm, iterations


def _add_absent_classes(
    features: Float64[np.ndarray, "n d"],
    present: Int[np.ndarray, " p"],
    kernel: Float64[np.ndarray, "d p"],
    bias: Float64[np.ndarray, " p"],
    num_classes: int,
) -> tuple[Float64[np.ndarray, "d {num_classes}"], Float64[np.ndarray, " {num_classes}"]]:
    """Extends a layer of the classes that occur to all classes; returns its kernel and bias."""
    logits = features @ kernel + bias
    absent_bias = np.logaddexp.reduce(logits, axis=1).min() - math.log(len(features) + 1)
    all_kernel = np.zeros((len(kernel), num_classes))
    all_bias = np.full(num_classes, absent_bias)
    all_kernel[:, present], all_bias[present] = kernel, bias
    return all_kernel, all_bias


def _check(features: np.ndarray, targets: np.ndarray, num_classes: int) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1] or not features.size:
        raise DataError(
            f"features are {list(features.shape)} and targets {list(targets.shape)}; they must be "
            "[n d] and [n], and not empty."
        )
    if targets.min() < 0 or targets.max() >= num_classes:
        raise DataError(
            f"targets are from {targets.min()} to {targets.max()}; {num_classes} classes are "
            f"numbered from 0 to {num_classes - 1}."
        )
    if not np.isfinite(features).all():
        wrong = np.flatnonzero(~np.isfinite(features).all(1))
        raise DataError(
            f"{len(wrong)} of {len(features)} rows of features are not finite, such as row "
            f"{wrong[0]}: the network computes NaN or infinity."
        )
