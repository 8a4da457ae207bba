"""L2-SP: keeps weights near their pretrained values (Li et al. 2018, arXiv:1802.01483)."""

from dataclasses import dataclass

import jax

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.labels import Tree, paths, unflatten


@checked()
@dataclass(frozen=True)
class L2SP:
    """The penalty body/2·‖w - w0‖² + head/2·‖w‖² on the trainable parameters.

    w0 are the weights at the start of the run, not of the stage. The head is new and has no
    pretrained values, so it is pulled to zero. Reported losses do not include the penalty.

    Attributes:
      body: strength of the penalty on all parameters but the head.
      head: strength of the penalty on the head.
    """

    body: float = 0.1
    head: float = 0.01

    def __post_init__(self) -> None:
        if not (self.body >= 0 and self.head >= 0):
            raise RecipeError(f"{self} has a negative strength.")

    def pull(self, gradients: Tree, trainable: Tree, start: Tree, head: str) -> Tree:
        """Adds the gradient of the penalty.

        Args:
          gradients: gradients of the trainable half (None where frozen).
          trainable: parameters of the trainable half.
          start: all parameters at the start of the run, w0.
          head: path of the head.

        Returns:
          The gradients with the penalty's gradient added.

        Example:
          >>> import jax.numpy as jnp
          >>> zeros, ones = ({"body": jnp.full((), x), "fc": jnp.full((), x)} for x in (0.0, 1.0))
          >>> pulled = L2SP(0.1, 0.01).pull(zeros, ones, start=zeros, head="fc")
          >>> {name: round(float(g), 3) for name, g in pulled.items()}
          {'body': 0.1, 'fc': 0.01}
        """
        is_head = unflatten(start, [f"{path}.".startswith(f"{head}.") for path in paths(start)])

        def add(w0: jax.Array, is_head: bool, g: jax.Array | None, w: jax.Array | None) -> Tree:
            if g is None or w is None:
                return None
            return g + (self.head * w if is_head else self.body * (w - w0))

        return jax.tree.map(add, start, is_head, gradients, trainable)
