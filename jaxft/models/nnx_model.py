"""A Flax NNX module as a `Model`: plain nested dicts outside, the module only inside `apply`.

Of NNX this uses `graphdef`, `state`, `merge`, `eval_shape` and `to_pure_dict`. Its own jit, grad
and optimizers are never needed, because every jax transform sees arrays in dicts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxft.models.context import Context
from jaxft.models.model import Norms, Outline, Tree


@dataclass(frozen=True)
class NNXModel:
    """The `Model` whose network is `module(config, rngs=...)`.

    The module's parameters are `nnx.Param`, its running statistics `nnx.BatchStat` called `mean`
    and `var`, and its call is `module(x, context, blocks)`, where `blocks` is the run of
    `config.blocks` to apply. `config` is hashable, and equal models have equal hashes: a
    model can be a static argument.
    """

    name: str
    module: type[nnx.Module]
    config: Outline

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

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh `(params, stats)`, float32."""
        module = self._build(key)
        return _outside(nnx.state(module, nnx.Param)), _outside(nnx.state(module, nnx.BatchStat))

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
        self._check_norms(norms)
        module: Any = nnx.merge(self._abstract[0], _inside(params), _inside(stats))
        output = module(inputs, Context(norms, mask, replicas, key), blocks)
        if "batch" not in ([norms] if isinstance(norms, str) else norms.values()):
            return output, stats
        return output, _outside(nnx.state(module, nnx.BatchStat))

    def _build(self, key: jax.Array) -> nnx.Module:
        return self.module(self.config, rngs=nnx.Rngs(key))  # type: ignore[call-arg]

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, frozenset[str]]:
        """The module without its arrays, and the paths of its norm layers."""
        module = nnx.eval_shape(lambda: self._build(jax.random.key(0)))
        norms = frozenset(_parents(_outside(nnx.state(module, nnx.BatchStat))))
        return nnx.graphdef(module), norms

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

    def _check_norms(self, norms: Norms) -> None:
        if isinstance(norms, str):
            return
        wrong = sorted(self._abstract[1] ^ norms.keys())
        if wrong:
            raise ValueError(
                f"norms must name each norm layer of {self.name} once; "
                f"missing or unknown: {', '.join(wrong)}"
            )


def _outside(state: nnx.State) -> Tree:
    """Plain nested dicts; the indices of lists become strings."""
    return _rekey(nnx.to_pure_dict(state), str)


def _inside(tree: Tree) -> Tree:
    """The inverse of `_outside`: NNX wants the indices of lists as integers."""
    return _rekey(tree, lambda key: int(key) if key.isdecimal() else key)


def _rekey(tree: Tree, rename: Callable[[Any], str | int]) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {rename(key): _rekey(value, rename) for key, value in tree.items()}


def _parents(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted path of each dict that holds leaves."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _parents(value, (*path, key))
        else:
            yield ".".join(path)
