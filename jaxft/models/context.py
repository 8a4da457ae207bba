"""How one call of a network runs, as its parts see it."""

import zlib
from dataclasses import dataclass, replace

import jax
from jax.typing import ArrayLike

from jaxft.models.model import NormMode, Norms


@dataclass(frozen=True)
class Context:
    """What the part at `path` must know of the call.

    norms, mask, replicas, key: as in `Model.apply`.
    path: the part's own, dotted; empty for the whole network.
    """

    norms: Norms
    mask: ArrayLike | None = None
    replicas: int = 1
    key: jax.Array | None = None
    path: str = ""

    def below(self, name: str) -> "Context":
        """The context of the part called `name` within this one."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def mode(self) -> NormMode:
        """The mode of the norm layer at `path`."""
        return self.norms if isinstance(self.norms, str) else self.norms[self.path]

    def draw(self) -> jax.Array | None:
        """This part's own random key; None where nothing is random."""
        # By path: a block draws the same in a part of the network as in the whole.
        return (
            None
            if self.key is None
            else jax.random.fold_in(self.key, zlib.crc32(self.path.encode()))
        )
