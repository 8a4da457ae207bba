"""A Flax NNX module of the user's own as a `Model`."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.model import NormMode, Tree
from jaxft.models.modes import dotted
from jaxft.models.nnx_trees import inside, outside
from jaxft.models.own import OwnModel, rows_of

_KINDS = (nnx.Param, nnx.BatchStat, nnx.RngState)


@dataclass(frozen=True)
class NNX(OwnModel):
    """An NNX module as a network; see `OwnModel` for what else to say.

        model = NNX(CNN, shape=(32, 32, 3), head="fc")  # or functools.partial(CNN, width=8)
        params, stats = model.init(jax.random.key(0))
        params, stats = model.trees(module)  # of one that is there

    build: called as `build(rngs=nnx.Rngs(key))`. Models are equal where their `build` is.

    The module is put in its `train()` mode if there is a key, else in `eval()`.

    Raises ModelError for a module with other variables than `nnx.Param`, `nnx.BatchStat` and those
    of its random streams, one that keeps running statistics elsewhere than in `nnx.BatchNorm`,
    and one whose output is not logits.
    """

    build: Callable[..., nnx.Module]

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self._abstract).__name__

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh `(params, stats)`, bit for bit those of `build(rngs=nnx.Rngs(key))`."""
        return self.trees(self.build(rngs=nnx.Rngs(key)))

    def trees(self, module: nnx.Module) -> tuple[Tree, Tree]:
        """The `(params, stats)` of a module such as `build` makes, for instance a trained one."""
        return outside(module, nnx.Param), outside(module, nnx.BatchStat)

    def _run(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        modes: Mapping[str, NormMode],
        mask: ArrayLike | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        graph, like_params, like_stats, streams = self._split
        streams = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _stream(dotted(path), leaf, key), nnx.to_pure_dict(streams)
        )
        module = nnx.merge(graph, inside(params, like_params), inside(stats, like_stats), streams)
        module.eval() if key is None else module.train()
        for path, layer in _norms(module).items():
            object.__setattr__(layer, "__class__", _governed(layer.__class__))
            layer.jaxft_path, layer.jaxft_mode, layer.jaxft_mask = path, modes[path], mask
        logits = self.call(module, images, key is not None)
        return logits, outside(module, nnx.BatchStat)

    def _batch_norms(self) -> set[str]:
        return {*_norms(self._abstract)}

    @cached_property
    def _abstract(self) -> nnx.Module:
        module: nnx.Module = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return module

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
        graph, *states = nnx.split(self._abstract, *_KINDS, ...)
        params, stats, streams, others = states
        if found := [".".join(map(str, path)) for path, _ in nnx.to_flat_state(others)]:
            raise ModelError(
                f"{self.name} has state at {', '.join(found)} that is neither nnx.Param nor "
                "nnx.BatchStat nor of a random stream: only those are trained, saved and resumed. "
                "Constants can be made in the call."
            )
        return graph, params, stats, streams


def _norms(module: nnx.Module) -> dict[str, Any]:
    found = ((path, x) for path, x in nnx.iter_modules(module) if isinstance(x, nnx.BatchNorm))
    return {".".join(map(str, path)): x for path, x in found}


class _Governed(nnx.BatchNorm):
    """A batch norm whose statistics and rows are told beforehand, whatever its call says."""

    jaxft_path: str
    jaxft_mode: NormMode
    jaxft_mask: ArrayLike | None

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        rows = rows_of(self.jaxft_path, x, self.jaxft_mask)
        rows = mask if rows is None else rows if mask is None else rows & mask
        return super().__call__(x, self.jaxft_mode == "running", mask=rows)


@cache
def _governed(kind: type[nnx.BatchNorm]) -> type[_Governed]:
    """The class to which a layer of that kind can change, in the merged copy that a call makes."""
    # Last but for its base: a subclass with a call of its own comes to it by super().
    return type(kind.__name__, (kind, _Governed), {}) if kind is not nnx.BatchNorm else _Governed


def _stream(path: str, leaf: jax.ShapeDtypeStruct, key: jax.Array | None) -> jax.Array:
    """A random stream's key or count at the start of a call."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    # By path, so that no two layers draw the same; without a key nothing is drawn.
    key = jax.random.key(0) if key is None else key
    return jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)
