"""The keys that a network's fresh parameters are drawn by."""

import jax


class Rngs:
    """The keys of `flax.nnx.Rngs(key)`, one after another, counted in Python.

    Flax counts in an array: traced, as for a network's shapes, that takes as long as all the rest.
    """

    def __init__(self, key: jax.Array) -> None:
        self._key = key
        self._count = 0

    def params(self) -> jax.Array:
        """The next key."""
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key
