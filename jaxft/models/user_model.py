"""The part of a `Model` that Linen and NNX modules share."""

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
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxft.errors import ModelError
from jaxft.models.model import UPDATING, NormMode, Norms, Replicas, Tree
from jaxft.models.norm_modes import dotted, layer_modes, norm_layers

Call = Callable[[Any, jax.Array, bool], jax.Array]
"""`(module, images, is_training) -> logits`: calls a module."""

# Usual names of the flag, and its value in training.
_TRAINING_FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def default_call(module: Any, images: jax.Array, is_training: bool) -> jax.Array:
    """Calls `module(images)` with each usual training flag that its signature has."""
    parameters = inspect.signature(module.__call__).parameters
    flags = {
        flag: in_training is is_training
        for flag, in_training in _TRAINING_FLAGS.items()
        if flag in parameters
    }
    return module(images, **flags)


@dataclass(frozen=True, kw_only=True)
class UserModel(ABC):
    """The framework-independent part of `Linen` and `NNX`.

    The network is a single block. Its batch norm layers must be of the framework's class or a
    subclass. `norms` alone selects their statistics; flags of the module's code have no effect.

    Attributes:
      shape: shape of an image, `(h, w, c)`.
      head: path of the classifier's parameters, such as `Dense_0` or `classifier.out`.
      call: function that calls the module. The default passes the images, and each of `train`,
        `training`, `is_training`, `deterministic` and `use_running_average` that the module takes.
    """

    shape: tuple[int, int, int]
    head: str
    call: Call = default_call

    def __post_init__(self) -> None:
        if not _is_image_shape(self.shape):
            raise ModelError(
                f"shape is {self.shape!r}; it must be the shape of an image, (h, w, c), such as "
                "(224, 224, 3)."
            )
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        try:
            hash(self)
        except TypeError as error:
            raise ModelError(
                f"{self.call!r} cannot be hashed, and a network must be a static argument of a "
                "compiled step: pass a function as call."
            ) from error
        _check_head(self.name, self.head, self._shapes[0])
        if uncontrolled := sorted(self._norm_layers ^ self._batch_norms()):
            raise ModelError(
                f"{self.name} keeps running statistics in {', '.join(uncontrolled)}, which are not "
                "Flax BatchNorm layers: a stage could not select their statistics."
            )
        if not (hasattr(self._logits, "shape") and self._logits.shape[:-1] == (2,)):
            shapes = jax.tree.map(lambda x: list(x.shape), self._logits)
            raise ModelError(
                f"{self.name} returns {shapes} for images {[2, *self.shape]}; it must return "
                "logits [2 k]. Select them with call=lambda module, images, is_training: ..."
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """One block, because the places where the network could be cut are unknown."""
        return ("network",)

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Pattern of the single block; it selects all parameters."""
        return (("*",),)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return int(self._logits.shape[-1])

    @property
    def key_map(self) -> None:
        """None: weights files use the module's names and layouts."""
        return None

    @property
    def options(self) -> dict[str, Any]:
        """Empty, because `create` does not build the module."""
        return {}

    def apply(
        self,
        params: Tree,
        stats: Tree,
        inputs: Float[jax.Array, "b h w c"],
        *,
        norms: Norms,
        mask: Bool[ArrayLike, " b"] | None = None,
        replicas: Replicas = 1,
        key: PRNGKeyArray | None = None,
        first: str | None = None,
        last: str | None = None,
    ) -> tuple[Float[jax.Array, "b k"], Tree]:
        """Applies the module; see `Model.apply`.

        With a `key` the module is called in training mode. Half-precision logits are cast to
        float32.

        Raises:
          ModelError: if the images have another shape than `shape`, if `first` or `last` is
            another block, or if `replicas` is above 1 and the module has norm layers.
          ValueError: if `norms` leaves out a norm layer or names one that does not exist.
        """
        if not {first, last} <= {None, *self.blocks}:
            raise ModelError(
                f"{self.name} is one block, {self.blocks[0]!r}: it has no blocks from {first!r} to "
                f"{last!r}"
            )
        if inputs.shape[1:] != self.shape:
            raise ModelError(
                f"{self.name} was declared for images {['b', *self.shape]}, and got "
                f"{list(inputs.shape)}: they must agree (the recipe's image_size sets the size of "
                "a run's images)"
            )
        if replicas != 1 and self._norm_layers:
            raise ModelError(
                f"Flax's BatchNorm in {self.name} takes the statistics of the whole batch: "
                f"replicas must be 1, not {replicas}"
            )
        modes = layer_modes(self.name, self._norm_layers, norms)
        logits, updated = self._run(params, stats, inputs, modes, mask, key)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if UPDATING.isdisjoint(modes.values()):
            return logits, stats

        def select(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            return new.astype(old.dtype) if modes[dotted(path[:-1])] in UPDATING else old

        return logits, jax.tree_util.tree_map_with_path(select, stats, updated)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the network."""

    @abstractmethod
    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)`, drawn by the module."""

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
        """Returns the module's output for the images, and its statistics after the call."""

    @abstractmethod
    def _batch_norms(self) -> set[str]:
        """Returns the paths of the batch norm layers whose modes `_run` controls."""

    @cached_property
    def _shapes(self) -> tuple[Tree, Tree]:
        """Shapes of params and stats."""
        shapes: tuple[Tree, Tree] = self._eval_shape(self.init, jax.random.key(0))
        return shapes

    @cached_property
    def _norm_layers(self) -> frozenset[str]:
        return norm_layers(self._shapes[1])

    @cached_property
    def _logits(self) -> Any:
        """Shape of the module's output for two images."""

        def run(params: Tree, stats: Tree, images: jax.Array) -> Any:
            modes = layer_modes(self.name, self._norm_layers, "running")
            return self._run(params, stats, images, modes, None, None)[0]

        return self._eval_shape(run, *self._shapes, jnp.zeros((2, *self.shape)))

    def _eval_shape(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the shapes of a function's results; raises ModelError if the module fails."""
        try:
            return jax.eval_shape(function, *arguments)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.name} fails on images of shape {self.shape}: "
                f"{type(error).__name__}: {error}\nIf it was built for another size, set "
                "shape=(h, w, c); if it is called with other arguments, set "
                "call=lambda module, images, is_training: ..."
            ) from error


def _is_image_shape(shape: Any) -> bool:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
        return False
    return all(isinstance(side, numbers.Integral) and int(side) > 0 for side in shape)


def statistics_mask(
    layer: str, x: jax.Array, mask: ArrayLike | None, layer_mask: jax.Array | None
) -> jax.Array | None:
    """Returns the mask of the values that contribute to a norm layer's batch statistics.

    Args:
      layer: path of the layer.
      x: its input `[b ...]`.
      mask: `[b]`, False for padding rows; None if there are none.
      layer_mask: the mask that the module passes to the layer, broadcastable to `x`.

    Returns:
      A mask broadcastable to `x`; None if all values contribute.

    Raises:
      ValueError: if the layer's input does not have the batch as its first axis.
    """
    if mask is None:
        return layer_mask
    rows = jnp.asarray(mask, bool)
    if x.shape[0] != len(rows):
        raise ValueError(
            f"the input of {layer} is {list(x.shape)} in a batch of {len(rows)}: its padding rows "
            "are unknown. Keep the batch as its first axis, or pass no mask."
        )
    rows = rows.reshape(-1, *(1 for _ in x.shape[1:]))
    return rows if layer_mask is None else rows & layer_mask


def check_batch_statistics(layer: str, x: jax.Array) -> None:
    """Raises ValueError if a norm layer's input has only one value per channel."""
    if x.size <= x.shape[-1]:
        raise ValueError(f"batch statistics of {layer} need more than one value per channel")


def _check_head(name: str, head: str, params: Tree) -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    layers = sorted({dotted(path[:-1]) for path, _ in flat})
    if not any(f"{layer}.".startswith(f"{head}.") for layer in layers):
        similar = difflib.get_close_matches(head, layers, n=1)
        hint = f"Did you mean {similar[0]!r}?  " if similar else ""
        raise ModelError(
            f"{name} has no parameters at its head, {head!r}.\n  {hint}It has parameters at: "
            f"{', '.join(layers)}"
        )
