"""A Flax NNX module as a `Model`: plain nested dicts outside, the module only inside `apply`.

Of NNX this uses `split`, `merge`, `state`, `eval_shape` and `to_pure_dict`. Its own jit, grad
and optimizers are never needed, because every jax transform sees arrays in dicts.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxft.models.context import Context
from jaxft.models.model import OPTIONS, Norms, Outline, Tree
from jaxft.models.nnx_trees import inside, outside
from jaxft.models.norm_modes import layer_modes, norm_layers
from jaxft.models.rngs import Rngs


class Config(Outline, Protocol):
    """What an `NNXModel` needs to know of its module."""

    @property
    def param_dtype(self) -> str:
        """The dtype of parameters and statistics."""
        ...


@dataclass(frozen=True)
class NNXModel:
    """The `Model` whose network is `module(config, rngs=Rngs(key))`.

    The module's parameters are `nnx.Param`, its running statistics `nnx.BatchStat` called `mean`
    and `var`, and its call is `module(x, context, blocks)`, where `blocks` is the run of
    `config.blocks` to apply. `config` is hashable, and equal models have equal hashes: a
    model can be a static argument.
    """

    name: str
    module: type[nnx.Module]
    config: Config

    @property
    def blocks(self) -> tuple[str, ...]:
        """The network's steps, from input to output."""
        return self.config.blocks

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """The patterns that select each block's parameters."""
        return self.config.block_patterns

    @property
    def head(self) -> str:
        """The path of the classifier's parameters."""
        return self.config.head

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.config.num_classes

    @property
    def torch_named(self) -> bool:
        """Always."""
        return True

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `jaxft.models.create` that the configuration has."""
        return {name: getattr(self.config, name) for name in OPTIONS if hasattr(self.config, name)}

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)` in `config.param_dtype`, drawn in float32."""
        module = self._build(key)
        trees = outside(module, nnx.Param), outside(module, nnx.BatchStat)
        return jax.tree.map(lambda x: x.astype(self.config.param_dtype), trees)

    def apply(
        self,
        params: Tree,
        stats: Tree,
        inputs: jax.Array,
        *,
        norms: Norms,
        mask: ArrayLike | None = None,
        replicas: int = 1,
        key: jax.Array | None = None,
        first: str | None = None,
        last: str | None = None,
    ) -> tuple[jax.Array, Tree]:
        """See `Model.apply`. `params` and `stats` are whole, also for a run of few blocks.

        Raises ValueError for a run of blocks that does not exist, and for `norms` that leave out
        a norm layer or name one that does not exist.
        """
        blocks = self._run(first, last)
        graph, like_params, like_stats, layers = _abstract(self)
        modes = layer_modes(self.name, layers, norms)
        module: Any = nnx.merge(graph, inside(params, like_params), inside(stats, like_stats))
        output = module(inputs, Context(modes, mask, replicas, key), blocks)
        return output, outside(module, nnx.BatchStat) if "batch" in modes.values() else stats

    def _build(self, key: jax.Array) -> nnx.Module:
        return self.module(self.config, rngs=Rngs(key))  # type: ignore[call-arg]

    def _run(self, first: str | None, last: str | None) -> tuple[str, ...]:
        try:
            start = 0 if first is None else self.blocks.index(first)
            end = len(self.blocks) if last is None else self.blocks.index(last) + 1
        except ValueError:
            start = end = 0
        if start >= end:
            raise ValueError(
                f"no run of blocks from {first!r} to {last!r} in {self.name}; "
                f"its blocks are, in order: {', '.join(self.blocks)}"
            )
        return self.blocks[start:end]


@lru_cache(maxsize=16)
def _abstract(model: NNXModel) -> tuple[nnx.GraphDef, Tree, Tree, frozenset[str]]:
    """The module without its arrays, their shapes, and the paths of its norm layers."""
    module = nnx.eval_shape(lambda: model._build(jax.random.key(0)))
    graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat)
    params, stats = map(nnx.to_pure_dict, states)
    return graph, params, stats, norm_layers(outside(module, nnx.BatchStat))
