"""Averages of weights: WiSE-FT between the start and the end of a stage."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.labels import Tree


@checked(
    alpha="it is called alphas, and is a tuple",
    alpha_grid="it is called alphas",
    mixing_coefficients="it is called alphas",
)
@dataclass(frozen=True)
class WiSE:
    """Ends a stage with the best average of its start and its end: WiSE-FT.

    Each average is `(1 - alpha) * start + alpha * end` for all parameters that train. The best by
    the stage's monitor is kept; ties go to the larger alpha. The end, `alpha = 1`, is the epoch
    that `restore` selects. Start and end keep their running statistics. For the averages between
    them, the statistics that the stage updates are computed again from the training images, see
    `jaxft.train.norm_statistics`. After `LinearProbe`, this is the recipe of the paper.

    Reference: Wortsman et al. 2021 (arXiv:2109.01903).

    Attributes:
      alphas: shares of the end, each between 0 and 1.

    Raises:
      RecipeError: an alpha is out of range or repeated, or there is none.
    """

    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.alphas:
            raise RecipeError("WiSE: alphas is empty; give it at least one.")
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise RecipeError(f"WiSE: alphas are {self.alphas}; each must lie between 0 and 1.")
        if len({*self.alphas}) < len(self.alphas):
            raise RecipeError(f"WiSE: alphas are {self.alphas}; each must occur once.")


@jax.jit
def interpolate(start: Tree, end: Tree, alpha: float) -> Tree:
    """Returns `(1 - alpha) * start + alpha * end`.

    Elements that are equal stay bit-identical.

    Example:
      >>> tree = interpolate({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 4.0])}, 0.25)
      >>> tree["w"].tolist()
      [0.25, 1.0]
    """

    def between(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(x == y, y, ((1 - alpha) * x + alpha * y).astype(y.dtype))

    return jax.tree.map(between, start, end)
