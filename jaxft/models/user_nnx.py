"""A Flax NNX module of the user's own as a `Model`."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.model import NormMode, Tree
from jaxft.models.nnx_trees import inside, outside
from jaxft.models.norm_modes import dotted
from jaxft.models.user_model import OwnModel, check_values, rows_of

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

    def __post_init__(self) -> None:
        if isinstance(self.build, nnx.Module):
            kind = type(self.build).__name__
            raise ModelError(
                f"NNX takes what builds a module, and got a {kind} that is built: give the class, "
                f"model = NNX({kind}, ...), or functools.partial({kind}, ...) with its arguments. "
                "Its weights are start=model.trees(module)."
            )
        if not callable(self.build):
            raise ModelError(
                f"NNX takes what builds a module, a class or function called with rngs=, not a "
                f"{type(self.build).__name__}."
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        """The module's class."""
        return self._abstract.name

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
        graph, _, _, (like_params, like_stats, like_streams) = self._abstract
        streams = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _stream(dotted(path), leaf, key), like_streams
        )
        module = nnx.merge(graph, inside(params, like_params), inside(stats, like_stats), streams)
        module.eval() if key is None else module.train()
        for path, layer in _norms(module).items():
            object.__setattr__(layer, "__class__", _governed(layer.__class__))
            layer.jaxft_path, layer.jaxft_mode, layer.jaxft_mask = path, modes[path], mask
        logits = self.call(module, images, key is not None)
        return logits, outside(module, nnx.BatchStat)

    def _batch_norms(self) -> set[str]:
        return self._abstract.norms

    @cached_property
    def _abstract(self) -> "_Abstract":
        found = []

        def trace(key: jax.Array) -> list[Tree]:
            module = self.build(rngs=nnx.Rngs(key))
            graph, *states = nnx.split(module, *_KINDS, ...)
            others = {*map(_dotted, nnx.to_flat_state(states.pop()).paths), *_arrays(module)}
            found.append((graph, type(module).__name__, {*_norms(module)}, others))
            return [nnx.to_pure_dict(state) for state in states]

        shapes = jax.eval_shape(trace, jax.random.key(0))
        graph, name, norms, others = found[0]
        if others:
            raise ModelError(
                f"{name} has state at {', '.join(sorted(others))} that is neither nnx.Param nor "
                "nnx.BatchStat nor of a random stream: only those are trained, saved and resumed. "
                "Constants can be made in the call, or be numpy's."
            )
        return _Abstract(graph, name, norms, shapes)


class _Abstract(NamedTuple):
    """A module without its arrays: the paths of its batch norms, the shapes of each of `_KINDS`."""

    graph: nnx.GraphDef
    name: str
    norms: set[str]
    shapes: list[Tree]


def _norms(module: nnx.Module) -> dict[str, Any]:
    found = ((path, x) for path, x in nnx.iter_modules(module) if isinstance(x, nnx.BatchNorm))
    return {_dotted(path): x for path, x in found}


def _arrays(module: nnx.Module) -> set[str]:
    """Where a module keeps arrays as they are: while it is traced NNX takes them for static."""
    return {
        _dotted((*path, name))
        for path, part in nnx.iter_modules(module)
        for name, value in vars(part).items()
        if isinstance(value, jax.Array)
    }


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


class _Governed(nnx.BatchNorm):
    """A batch norm whose statistics and rows are told beforehand, whatever its call says."""

    jaxft_path: str
    jaxft_mode: NormMode
    jaxft_mask: ArrayLike | None

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        if self.jaxft_mode != "running":
            check_values(self.jaxft_path, x)
        rows = rows_of(self.jaxft_path, x, self.jaxft_mask, mask)
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
