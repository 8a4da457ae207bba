"""A Flax NNX module as a `Model`."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.block_cuts import InputEdits
from jaxft.models.model import NormMode, Tree
from jaxft.models.nnx_adapter import variables, with_nnx_keys
from jaxft.models.norm_modes import check_batch_statistics, dotted, statistics_mask
from jaxft.models.user_model import UserModel

_KINDS = (nnx.Param, nnx.BatchStat, nnx.RngState)


@dataclass(frozen=True)
class NNX(UserModel):
    """Wraps an NNX module as a network; `UserModel` describes the other arguments.

    The module is switched to `train()` if `apply` receives a key, and to `eval()` otherwise.

    Attributes:
      build: class or function that returns the module when called as `build(rngs=nnx.Rngs(key))`,
        such as `functools.partial(ViT, width=8)`.
        Models with the same `build` and arguments are equal.

    Raises:
      ModelError: if the module has other variables than `nnx.Param`, `nnx.BatchStat` and its random
        streams, keeps running statistics elsewhere than in `nnx.BatchNorm`, or does not return
        logits.

    Example:
        model = NNX(ViT, shape=(32, 32, 3), head="fc", blocks=("layers.4", "layers.8"))
        params, stats = model.init(jax.random.key(0))
        params, stats = model.trees(module)  # the arrays of an existing module
    """

    build: Callable[..., nnx.Module]

    def __post_init__(self) -> None:
        if isinstance(self.build, nnx.Module):
            class_name = type(self.build).__name__
            raise ModelError(
                f"NNX takes a class or function that builds a module, not an instance of "
                f"{class_name}: pass the class, model = NNX({class_name}, ...), or "
                f"functools.partial({class_name}, ...) with its arguments. To start from the "
                "instance's weights, pass start=model.trees(module)."
            )
        if not callable(self.build):
            raise ModelError(
                f"NNX takes a class or function that builds a module when called with rngs=, not a "
                f"{type(self.build).__name__}."
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return self._abstract.name

    def trees(self, module: nnx.Module) -> tuple[Tree, Tree]:
        """Returns the `(params, stats)` of an existing module, such as a trained one."""
        return self._split(variables(module, nnx.Param), variables(module, nnx.BatchStat))

    def _init(self, key: jax.Array) -> tuple[Tree, Tree]:
        module = self.build(rngs=nnx.Rngs(key))
        return variables(module, nnx.Param), variables(module, nnx.BatchStat)

    def _run(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        modes: Mapping[str, NormMode],
        mask: ArrayLike | None,
        key: jax.Array | None,
        edits: InputEdits,
    ) -> tuple[jax.Array, Tree]:
        graph, _, _, (param_template, stat_template, stream_template) = self._abstract
        streams = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _stream(dotted(path), leaf, key), stream_template
        )
        module = nnx.merge(
            graph,
            with_nnx_keys(params, param_template),
            with_nnx_keys(stats, stat_template),
            streams,
        )
        module.eval() if key is None else module.train()
        for path, layer in _submodules(module).items():
            if isinstance(layer, nnx.BatchNorm):
                _control(layer, path, modes[path], mask)
            if path in edits.by_path and callable(layer):
                object.__setattr__(layer, "__class__", _edited(layer.__class__))
                layer.jaxft_entered = partial(edits.entered, path)
        logits = self.call(module, images, key is not None)
        return logits, variables(module, nnx.BatchStat)

    def _submodules(self, kind: tuple[type, ...] = (object,)) -> list[str]:
        submodules = self._abstract.submodules
        return [path for path, layer in submodules.items() if issubclass(layer, kind)]

    @cached_property
    def _abstract(self) -> "_AbstractModule":
        static = []

        def trace(key: jax.Array) -> list[Tree]:
            module = self.build(rngs=nnx.Rngs(key))
            graph, *states = nnx.split(module, *_KINDS, ...)
            others = {*map(_dotted, nnx.to_flat_state(states.pop()).paths), *_raw_arrays(module)}
            classes = {path: type(layer) for path, layer in _submodules(module).items()}
            static.append((graph, type(module).__name__, classes, others))
            return [nnx.to_pure_dict(state) for state in states]

        shapes = jax.eval_shape(trace, jax.random.key(0))
        graph, name, submodules, others = static[0]
        if others:
            raise ModelError(
                f"{name} has state at {', '.join(sorted(others))} that is neither nnx.Param nor "
                "nnx.BatchStat nor a random stream: only those are trained, saved and resumed. "
                "Create constants in the module's call, or as NumPy arrays."
            )
        return _AbstractModule(graph, name, submodules, shapes)


class _AbstractModule(NamedTuple):
    """A module without its arrays."""

    graph: nnx.GraphDef
    name: str
    submodules: dict[str, type]
    """Classes of the submodules, by path."""
    shapes: list[Tree]
    """Shapes of the variables of each of `_KINDS`."""


def _submodules(module: nnx.Module) -> dict[str, Any]:
    return {_dotted(path): submodule for path, submodule in nnx.iter_modules(module) if path}


def _raw_arrays(module: nnx.Module) -> set[str]:
    """Returns the paths of arrays that are no variables; NNX treats them as static in a trace."""
    return {
        _dotted((*path, name))
        for path, submodule in nnx.iter_modules(module)
        for name, value in vars(submodule).items()
        if isinstance(value, jax.Array)
    }


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


class _ControlledBatchNorm(nnx.BatchNorm):
    """Batch norm layer that ignores its caller's flag and uses `jaxft_mode` and `jaxft_mask`."""

    jaxft_path: str
    jaxft_mode: NormMode
    jaxft_mask: ArrayLike | None

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        use_running = self.jaxft_mode == "running"
        if not use_running:
            check_batch_statistics(self.jaxft_path, x)
        mask = statistics_mask(self.jaxft_path, x, self.jaxft_mask, mask)
        return super().__call__(x, use_running, mask=mask)


def _control(layer: Any, path: str, mode: NormMode, mask: ArrayLike | None) -> None:
    """Sets the statistics that a batch norm layer of the merged module uses."""
    object.__setattr__(layer, "__class__", _controlled(layer.__class__))
    layer.jaxft_path, layer.jaxft_mode, layer.jaxft_mask = path, mode, mask
    if mode == "batch_replace":
        layer.momentum = 0.0  # Flax's weight of the old statistics


@cache
def _controlled(layer_class: type[nnx.BatchNorm]) -> type[_ControlledBatchNorm]:
    """Returns the controlled variant of a batch norm class.

    A layer of the merged module can change to this class, because the module exists for one call.
    """
    if layer_class is nnx.BatchNorm:
        return _ControlledBatchNorm
    # The controlled class comes last, so that a subclass that overrides the call reaches it by
    # super().
    return type(layer_class.__name__, (layer_class, _ControlledBatchNorm), {})


@cache
def _edited(layer_class: type[Any]) -> type[Any]:
    """Returns the variant of a class whose call edits its input."""

    class Edited(layer_class):
        @wraps(layer_class.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with self.jaxft_entered(args) as edited:
                return super().__call__(*edited, **kwargs)

    return Edited


def _stream(path: str, leaf: jax.ShapeDtypeStruct, key: jax.Array | None) -> jax.Array:
    """Returns the key or the counter of a random stream at the start of a call."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    # The path enters the key, so that no two layers draw the same numbers. Without a key nothing
    # is drawn, and any key serves.
    key = jax.random.key(0) if key is None else key
    return jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)
