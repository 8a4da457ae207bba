"""The settings of one call of a network, as its layers receive them."""

import zlib
from dataclasses import dataclass, replace

import jax
from jax.typing import ArrayLike

from jaxft.models.model import NormMode, Norms, Replicas


@dataclass(frozen=True)
class Context:
    """Settings of one call of a network, for the submodule at `path`.

    Attributes:
      norms, mask, replicas, key: as in `Model.apply`.
      path: dotted path of the submodule; empty for the whole network.
    """

    norms: Norms
    mask: ArrayLike | None = None
    replicas: Replicas = 1
    key: jax.Array | None = None
    path: str = ""

    def child(self, name: str) -> "Context":
        """Returns the context of the submodule called `name`."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def mode(self) -> NormMode:
        """Mode of the norm layer at `path`."""
        return self.norms if isinstance(self.norms, str) else self.norms[self.path]

    def make_rng(self) -> jax.Array | None:
        """Returns the random key of this submodule; None if the call has no key."""
        if self.key is None:
            return None
        # The key depends on the path alone, so that a single block draws the same numbers as in the
        # whole network.
        return jax.random.fold_in(self.key, zlib.crc32(self.path.encode()))
