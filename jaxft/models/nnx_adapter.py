"""A Flax NNX module as a `Model`: nested dicts outside, the module only within `apply`.

Uses NNX's `split`, `merge`, `state`, `eval_shape` and `to_pure_dict`. NNX's jit, grad and
optimizers are not needed, because every JAX transform sees arrays in dicts.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.context import Context
from jaxft.models.key_map import KeyMap
from jaxft.models.layers import Rngs
from jaxft.models.model import STORED_OPTIONS, UPDATING, Model, Norms, Replicas, Tree
from jaxft.models.network_config import NetworkConfig
from jaxft.models.norm_modes import layer_modes, norm_layers

Library = Literal["torchvision", "timm"] | None
"""A library of torch with a network of the same name."""


def variables(module: nnx.Module, kind: type[nnx.Variable[Any]]) -> Tree:
    """Returns the module's variables of one kind as nested dicts.

    All keys are strings; list indices are converted.
    """
    return _with_string_keys(nnx.to_pure_dict(nnx.state(module, kind)))


def _with_string_keys(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_string_keys(value) for key, value in tree.items()}


def with_nnx_keys(tree: Tree, template: Tree) -> Tree:
    """Replaces the string keys of `tree` by the keys of `template`, the inverse of `variables`.

    `template` has the structure that `nnx.to_pure_dict` returns.
    """
    if not isinstance(template, dict):
        return tree
    return {key: with_nnx_keys(tree[str(key)], value) for key, value in template.items()}


@dataclass(frozen=True)
class NNXModel:
    """A `Model` that wraps the module `module(config, rngs=Rngs(key))`.

    The module's parameters are `nnx.Param`, and its running statistics are `nnx.BatchStat` called
    `mean` and `var`. It is called as `module(x, context, blocks)`, where `blocks` are consecutive
    entries of `config.blocks`.

    Attributes:
      name: name of the network.
      module: class of the module.
      config: its configuration, hashable, so that the model can be a static argument of `jax.jit`.
      key_map: names in weights files that differ from the network's.
      default_preprocessing: see `preprocessing`.
      torch_library: library whose network of this name accepts the weights.
    """

    name: str
    module: type[nnx.Module]
    config: NetworkConfig
    key_map: KeyMap = field(default_factory=KeyMap)
    default_preprocessing: Preprocessing | None = None
    torch_library: Library = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, from input to output."""
        return self.config.blocks

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block."""
        return self.config.block_patterns

    @property
    def head(self) -> str:
        """Path of the classifier's parameters."""
        return self.config.head

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.config.num_classes

    @property
    def image_size(self) -> int | None:
        """Side of the images, if the shapes of parameters depend on it."""
        return getattr(self.config, "image_size", None)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the images, for weights that do not state theirs."""
        return (self.default_preprocessing or Preprocessing()).at_size(self.image_size)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `jaxft.models.create` that the configuration has."""
        names = (name for name in STORED_OPTIONS if hasattr(self.config, name))
        return {name: getattr(self.config, name) for name in names}

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)`, drawn in float32 and cast to `config.param_dtype`."""
        module = self._build(key)
        trees = variables(module, nnx.Param), variables(module, nnx.BatchStat)
        return jax.tree.map(lambda x: x.astype(self.config.param_dtype), trees)

    def apply(
        self,
        params: Tree,
        stats: Tree,
        inputs: Float[jax.Array, "b ..."],
        *,
        norms: Norms,
        mask: Bool[ArrayLike, " b"] | None = None,
        replicas: Replicas = 1,
        key: PRNGKeyArray | None = None,
        first: str | None = None,
        last: str | None = None,
    ) -> tuple[Float[jax.Array, "b ..."], Tree]:
        """Applies the blocks from `first` to `last`; see `Model.apply`.

        `params` and `stats` are the whole trees, also for a few blocks.

        Raises:
          ValueError: if `first` or `last` is no block, if `last` comes before `first`, or if
            `norms` leaves out a norm layer or names one that does not exist.
        """
        blocks = self._blocks_between(first, last)
        graph, param_template, stat_template, layers = _split_shapes(self)
        modes = layer_modes(self.name, layers, norms)
        module: Any = nnx.merge(
            graph, with_nnx_keys(params, param_template), with_nnx_keys(stats, stat_template)
        )
        dtype = self.config.dtype
        if dtype is not None and blocks[0] == self.blocks[0]:
            inputs = inputs.astype(dtype)
        output = module(inputs, Context(modes, mask, replicas, key), blocks)
        is_updated = not UPDATING.isdisjoint(modes.values())
        return output, variables(module, nnx.BatchStat) if is_updated else stats

    def _build(self, key: jax.Array) -> nnx.Module:
        return self.module(self.config, rngs=Rngs(key))  # type: ignore[call-arg]

    def _blocks_between(self, first: str | None, last: str | None) -> tuple[str, ...]:
        try:
            start = 0 if first is None else self.blocks.index(first)
            end = len(self.blocks) if last is None else self.blocks.index(last) + 1
        except ValueError:
            start = end = 0
        if start >= end:
            raise ValueError(
                f"{self.name} has no blocks from {first!r} to {last!r}; "
                f"its blocks are, in order: {', '.join(self.blocks)}"
            )
        return self.blocks[start:end]


def expected_preprocessing(model: Model, stated: Preprocessing | None) -> Preprocessing:
    """Returns the preprocessing that weights state, or the network's, at the network's image size.

    Args:
      model: the network.
      stated: preprocessing that the weights state; None: they state none.
    """
    if isinstance(model, NNXModel):
        return stated.at_size(model.image_size) if stated else model.preprocessing
    return stated or Preprocessing()


@lru_cache(maxsize=16)
def _split_shapes(model: NNXModel) -> tuple[nnx.GraphDef, Tree, Tree, frozenset[str]]:
    """Returns the graph, the shapes of params and stats, and the paths of the norm layers."""
    module = nnx.eval_shape(lambda: model._build(jax.random.key(0)))
    graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat)
    params, stats = map(nnx.to_pure_dict, states)
    return graph, params, stats, norm_layers(variables(module, nnx.BatchStat))


def init_shapes(model: Model) -> tuple[Tree, Tree]:
    """Returns the shapes of `model.init`; traces an `NNXModel` once in a process."""
    if not isinstance(model, NNXModel):
        shapes: tuple[Tree, Tree] = jax.eval_shape(model.init, jax.random.key(0))
        return shapes
    _, params, stats, _ = _split_shapes(model)
    dtype = jnp.dtype(model.config.param_dtype)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        (_with_string_keys(params), _with_string_keys(stats)),
    )
