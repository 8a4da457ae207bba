"""Penalties that keep weights near their pretrained values: L2-SP and L1-SP.

Reference: Li et al. 2018, arXiv:1802.01483.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.labels import Tree, paths, unflatten


@dataclass(frozen=True)
class _Anchor(ABC):
    """A penalty on the distance from the weights w0 at the start of the run, not of the stage.

    The head is new and has no pretrained values, so it is pulled to zero by head/2·‖w‖². Reported
    losses do not include the penalty.

    Attributes:
      body: strength of the penalty on all parameters but the head.
      head: strength of the penalty on the head.
    """

    body: float = 0.1
    head: float = 0.01

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not (self.body >= 0 and self.head >= 0):
            raise RecipeError(f"{self} has a negative strength.")

    @abstractmethod
    def _body_gradient(self, distance: jax.Array) -> jax.Array:
        """Returns the gradient of the penalty at a distance w - w0, for strength 1."""

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
          >>> zeros, twos = ({"body": jnp.full((), x), "fc": jnp.full((), x)} for x in (0.0, 2.0))
          >>> for anchor in (L2SP(0.1, 0.01), L1SP(0.1, 0.01)):
          ...     pulled = anchor.pull(zeros, twos, start=zeros, head="fc")
          ...     print({name: round(float(g), 3) for name, g in pulled.items()})
          {'body': 0.2, 'fc': 0.02}
          {'body': 0.1, 'fc': 0.02}
        """
        is_head = unflatten(start, [f"{path}.".startswith(f"{head}.") for path in paths(start)])

        def add(w0: jax.Array, is_head: bool, g: jax.Array | None, w: jax.Array | None) -> Tree:
            if g is None or w is None:
                return None
            return g + (self.head * w if is_head else self.body * self._body_gradient(w - w0))

        return jax.tree.map(add, start, is_head, gradients, trainable)


@checked()
@dataclass(frozen=True)
class L2SP(_Anchor):
    """The penalty body/2·‖w - w0‖² + head/2·‖w‖² on the trainable parameters.

    w0 are the weights at the start of the run, not of the stage. The head is new and has no
    pretrained values, so it is pulled to zero. Reported losses do not include the penalty.

    Attributes:
      body: strength of the penalty on all parameters but the head.
      head: strength of the penalty on the head.
    """

    penalty: Literal["l2_sp"] = "l2_sp"

    def _body_gradient(self, distance: jax.Array) -> jax.Array:
        return distance


@checked()
@dataclass(frozen=True)
class L1SP(_Anchor):
    """The penalty body·‖w - w0‖₁ + head/2·‖w‖² on the trainable parameters.

    As `L2SP`, but many weights of the body keep their pretrained values almost exactly.

    Attributes:
      body: strength of the penalty on all parameters but the head.
      head: strength of the penalty on the head.
    """

    penalty: Literal["l1_sp"] = "l1_sp"

    def _body_gradient(self, distance: jax.Array) -> jax.Array:
        return jnp.sign(distance)


Anchor = L2SP | L1SP
