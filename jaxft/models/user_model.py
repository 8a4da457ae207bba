"""A module of the user's own as a `Model`: what those of Linen and of NNX have in common."""

import difflib
import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.model import NormMode, Norms, Tree
from jaxft.models.norm_modes import dotted, layer_modes, norm_layers

Call = Callable[[Any, jax.Array, bool], jax.Array]
"""`(module, images, trains) -> logits`: how a module is called, and told whether it trains."""

# What modules call the flag, and its value in training.
_FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def usual_call(module: Any, images: jax.Array, trains: bool) -> jax.Array:
    """`module(images)`, with each of the usual flags that the module's signature has."""
    told = inspect.signature(module.__call__).parameters
    return module(images, **{flag: v is trains for flag, v in _FLAGS.items() if flag in told})


@dataclass(frozen=True, kw_only=True)
class OwnModel(ABC):
    """The part of a `Model` that needs no framework; `Linen` and `NNX` add the rest.

    shape: of an image, `(h, w, c)`.
    head: the path of the classifier's parameters, such as `Dense_0` or `classifier.out`.
    call: how the module is called. By default with the images, and with such of `train`,
      `training`, `is_training`, `deterministic` and `use_running_average` as it takes.

    The network is one block. Its batch norms must be the framework's own or subclasses: each
    is told its statistics by `norms`, whatever the module tells it.
    """

    shape: tuple[int, int, int]
    head: str
    call: Call = usual_call

    def __post_init__(self) -> None:
        if not _is_shape(self.shape):
            raise ModelError(
                f"shape is {self.shape!r}; it must be that of an image, (h, w, c), such as "
                "(224, 224, 3)."
            )
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        try:
            hash(self)
        except TypeError as error:
            raise ModelError(
                f"{self.call!r} cannot be hashed, and a network must be a static argument of a "
                "compiled step: let call be a function."
            ) from error
        _check_head(self.name, self.head, self._trees[0])
        if ungoverned := sorted(self._layers ^ self._batch_norms()):
            raise ModelError(
                f"{self.name} keeps running statistics in {', '.join(ungoverned)}, which are no "
                "flax BatchNorm: a stage could not say which statistics they use."
            )
        if not (hasattr(self._logits, "shape") and self._logits.shape[:-1] == (2,)):
            shapes = jax.tree.map(lambda x: list(x.shape), self._logits)
            raise ModelError(
                f"{self.name} makes {shapes} of images {[2, *self.shape]}; it must be logits "
                "[2 k]. Say which they are with call=lambda module, images, trains: ..."
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """One: where such a network can be cut is not known."""
        return ("network",)

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Of the one block: everything."""
        return (("*",),)

    @property
    def num_classes(self) -> int:
        """Number of logits, as the module makes them."""
        return int(self._logits.shape[-1])

    @property
    def torch_named(self) -> bool:
        """Never: weights keep the module's own names and layouts."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """None: the module's own fields are not jaxft's to know."""
        return {}

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
        """See `Model.apply`. Half-precision logits become float32.

        The module is told that it trains if there is a `key`. Raises ModelError for images of
        another shape, for a part of the network and for more than one replica, ValueError for
        `norms` that leave out a norm layer or name one that does not exist.
        """
        if not {first, last} <= {None, *self.blocks}:
            raise ModelError(
                f"{self.name} is one block, {self.blocks[0]!r}: there is no run of blocks from "
                f"{first!r} to {last!r}"
            )
        if inputs.shape[1:] != self.shape:
            raise ModelError(
                f"{self.name} was declared for images {['b', *self.shape]}, and got "
                f"{list(inputs.shape)}: they must agree (the recipe's image_size says what a run "
                "feeds it)"
            )
        if replicas != 1 and self._layers:
            raise ModelError(
                f"flax's BatchNorm in {self.name} takes the statistics of the whole batch: "
                f"replicas must be 1, not {replicas}"
            )
        modes = layer_modes(self.name, self._layers, norms)
        logits, moved = self._run(params, stats, inputs, modes, mask, key)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if "batch" not in modes.values():
            return logits, stats

        def kept(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            return new.astype(old.dtype) if modes[dotted(path[:-1])] == "batch" else old

        return logits, jax.tree_util.tree_map_with_path(kept, stats, moved)

    @property
    @abstractmethod
    def name(self) -> str:
        """What the user calls this network."""

    @abstractmethod
    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh `(params, stats)`, as the module draws them."""

    @abstractmethod
    def _run(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        modes: Mapping[str, NormMode],
        mask: ArrayLike | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        """What the module makes of the images, and its statistics after that."""

    @abstractmethod
    def _batch_norms(self) -> set[str]:
        """The paths of the batch norms that `_run` tells their modes."""

    @cached_property
    def _trees(self) -> tuple[Tree, Tree]:
        trees: tuple[Tree, Tree] = self._traced(self.init, jax.random.key(0))
        return trees

    @cached_property
    def _layers(self) -> frozenset[str]:
        return norm_layers(self._trees[1])

    @cached_property
    def _logits(self) -> Any:
        def run(params: Tree, stats: Tree, images: jax.Array) -> Any:
            modes = layer_modes(self.name, self._layers, "running")
            return self._run(params, stats, images, modes, None, None)[0]

        return self._traced(run, *self._trees, jnp.zeros((2, *self.shape)))

    def _traced(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The shapes that a function returns; ModelError where the module fails in it."""
        try:
            return jax.eval_shape(function, *arguments)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.name} fails on images of shape {self.shape}: "
                f"{type(error).__name__}: {error}\nIf it was built for another size, say so in "
                "shape=(h, w, c); how it is called, in call=lambda module, images, trains: ..."
            ) from error


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
        return False
    return all(isinstance(side, numbers.Integral) and int(side) > 0 for side in shape)


def rows_of(
    layer: str, x: jax.Array, mask: ArrayLike | None, own: jax.Array | None
) -> jax.Array | None:
    """The values of a norm layer's input `[b ...]` that enter its statistics; None: all do.

    Those of the rows of `mask` `[b]`, and of them those of the mask that the module gives itself.
    """
    if mask is None:
        return own
    rows = jnp.asarray(mask, bool)
    if x.shape[0] != len(rows):
        raise ValueError(
            f"{layer} is given {list(x.shape)} in a batch of {len(rows)}: which of its rows are "
            "padding is not known. Keep the batch its first axis, or pass no mask."
        )
    rows = rows.reshape(-1, *(1 for _ in x.shape[1:]))
    return rows if own is None else rows & own


def check_values(layer: str, x: jax.Array) -> None:
    """Raises ValueError if batch statistics of a norm layer's input would be of single values."""
    if x.size <= x.shape[-1]:
        raise ValueError(f"batch statistics of {layer} need more than one value per channel")


def _check_head(name: str, head: str, params: Tree) -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    parts = sorted({dotted(path[:-1]) for path, _ in flat})
    if not any(f"{part}.".startswith(f"{head}.") for part in parts):
        near = difflib.get_close_matches(head, parts, n=1)
        guess = f"Did you mean {near[0]!r}?  " if near else ""
        raise ModelError(
            f"{name} has no parameters at its head, {head!r}.\n  {guess}It has parameters at: "
            f"{', '.join(parts)}"
        )
