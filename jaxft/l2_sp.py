"""L2-SP: weights are held near those they started from (Li et al. 2018, arXiv:1802.01483)."""

from dataclasses import dataclass

import jax

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.labels import Tree, paths, unflatten


@checked()
@dataclass(frozen=True)
class Anchor:
    """The penalty body/2·‖w - w0‖² + head/2·‖w‖², of what trains.

    w0 are the weights that the run, not the stage, started from; the new head, which has no such
    past, is drawn to zero. The penalty is not part of the losses that are shown.
    """

    body: float = 0.1
    head: float = 0.01

    def __post_init__(self) -> None:
        if not (self.body >= 0 and self.head >= 0):
            raise RecipeError(f"{self} has a negative strength.")

    def pull(self, gradients: Tree, trainable: Tree, start: Tree, head: str) -> Tree:
        """The gradients with the penalty's added; `start` is w0, `head` the path of the head.

        `gradients` and `trainable` are `None` where frozen; `start` is whole.

        >>> import jax.numpy as jnp
        >>> zeros, ones = ({"body": jnp.full((), x), "fc": jnp.full((), x)} for x in (0.0, 1.0))
        >>> pulled = Anchor(0.1, 0.01).pull(zeros, ones, start=zeros, head="fc")
        >>> {name: round(float(g), 3) for name, g in pulled.items()}
        {'body': 0.1, 'fc': 0.01}
        """
        new = unflatten(start, [f"{path}.".startswith(f"{head}.") for path in paths(start)])

        def add(w0: jax.Array, new: bool, g: jax.Array | None, w: jax.Array | None) -> Tree:
            if g is None or w is None:
                return None
            return g + (self.head * w if new else self.body * (w - w0))

        return jax.tree.map(add, start, new, gradients, trainable)
