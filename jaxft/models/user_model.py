"""The part of a `Model` that Linen and NNX modules share."""

import difflib
import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxft.errors import ModelError
from jaxft.models.block_cuts import Blocks, Cutter, InputEdits, recorded
from jaxft.models.model import UPDATING, NormMode, Norms, Replicas, Tree
from jaxft.models.norm_modes import dotted, layer_modes, norm_layers
from jaxft.stacked_layers import join_layers, split_layers

Call = Callable[[Any, jax.Array, bool], jax.Array]
"""`(module, images, is_training) -> logits`: calls a module."""

BATCH_NORMS = (linen.BatchNorm, nnx.BatchNorm)
DROPOUTS = (linen.Dropout, nnx.Dropout)

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

    Batch norm layers must be of the framework's class or a subclass. `norms` alone selects their
    statistics; flags of the module's code have no effect.

    The blocks are `stem`, one from each submodule in `blocks` on, and `head`, which begins at the
    input of the head, or of a dropout layer right before it. A block without parameters joins the
    next one. Without `blocks`, the network is `stem` and `head`, or the single block `network` if
    the module cannot be cut before its head. `apply` runs a part of the blocks by calling the whole
    module, with features in place of the input of a submodule; a compiler leaves out the other
    blocks.

    Attributes:
      shape: shape of an image, `(h, w, c)`.
      head: path of the classifier's parameters, such as `Dense_0` or `classifier.out`.
      call: function that calls the module. The default passes the images, and each of `train`,
        `training`, `is_training`, `deterministic` and `use_running_average` that the module takes.
      blocks: paths of submodules in the order of their calls, such as `("layer1", "layers.2")`. A
        block begins at the input of each, its first positional argument, one array. Afterwards, the
        names of all blocks.
      stacked: paths of parameters that are stacked over layers on their first axis, as by `nn.scan`
        or `nnx.vmap`. Their layers become nested dicts, `blocks.3.attn.kernel`, as in the unrolled
        module.
      begins: path of the submodule at whose input each block begins; None for the images.
    """

    shape: tuple[int, int, int]
    head: str
    call: Call = default_call
    blocks: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    begins: tuple[str | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _is_image_shape(self.shape):
            raise ModelError(
                f"shape is {self.shape!r}; it must be the shape of an image, (h, w, c), such as "
                "(224, 224, 3)."
            )
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        for name in ("blocks", "stacked"):
            if isinstance(paths := getattr(self, name), str):
                raise ModelError(f"{name} is {paths!r}; it must be a tuple of paths: ({paths!r},).")
            object.__setattr__(self, name, tuple(paths))
        object.__setattr__(self, "begins", (None,))
        try:
            hash(self)
        except TypeError as error:
            raise ModelError(
                f"{self.call!r} cannot be hashed, and a network must be a static argument of a "
                "compiled step: pass a function as call."
            ) from error
        _check_head(self.name, self.head, self._shapes[0])
        if uncontrolled := sorted(self._norm_layers ^ {*self._submodules(BATCH_NORMS)}):
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
        cuts = self._cuts  # needs the paths in `blocks`
        object.__setattr__(self, "blocks", cuts.names)
        object.__setattr__(self, "begins", cuts.begins)

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block."""
        return self._cuts.patterns

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
        """Applies the blocks from `first` to `last`; see `Model.apply`.

        With a `key` the module is called in training mode. Half-precision logits are cast to
        float32.

        Raises:
          ModelError: if the images have another shape than `shape` or features another than the
            output of the block before `first`, if there are no blocks from `first` to `last`, or if
            `replicas` is above 1 and the module has norm layers.
          ValueError: if `norms` leaves out a norm layer or names one that does not exist.
        """
        start, end = self._between(first, last)
        if start == 0 and inputs.shape[1:] != self.shape:
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
        modes = {
            path: mode if start <= self._block_of_norm(path) < end else "running"
            for path, mode in layer_modes(self.name, self._norm_layers, norms).items()
        }
        outputs: list[jax.Array] = []
        edits: dict[str, Callable[[jax.Array], jax.Array]] = {}
        if end < len(self.blocks):
            edits[str(self.begins[end])] = partial(recorded, outputs)
        images = inputs
        if start:
            edits[str(self.begins[start])] = partial(self._replace, self.blocks[start], inputs)
            images = jnp.zeros((len(inputs), *self.shape))
        logits, updated = self._call(params, stats, images, modes, mask, key, InputEdits(edits))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        (output,) = outputs or [logits]
        if UPDATING.isdisjoint(modes.values()):
            return output, stats

        def select(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            return new.astype(old.dtype) if modes[dotted(path[:-1])] in UPDATING else old

        return output, jax.tree_util.tree_map_with_path(select, stats, updated)

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)`, bit-identical to those that the module draws."""
        return self._split(*self._init(key))

    def _split(self, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
        """Splits the layers of the `stacked` parameters."""
        for layer in norm_layers(stats):
            if f"{layer}.".startswith(tuple(f"{path}." for path in self.stacked)):
                raise ModelError(
                    f"{self.name} has the batch norm layer {layer} in a stack: one call would move "
                    "the statistics of all layers, and a stage selects them layer by layer. Use a "
                    "norm layer without running statistics there, or unroll the layers."
                )
        for path in self.stacked:
            params = split_layers(self.name, params, path)
        return params, stats

    def _call(self, params: Tree, *arguments: Any) -> tuple[jax.Array, Tree]:
        for path in self.stacked:
            params = join_layers(params, path)
        return self._run(params, *arguments)

    def _between(self, first: str | None, last: str | None) -> tuple[int, int]:
        """Returns the index of the first block and that after the last one."""
        if {first, last} <= {None, *self.blocks}:
            start = 0 if first is None else self.blocks.index(first)
            end = len(self.blocks) if last is None else self.blocks.index(last) + 1
            if start < end:
                return start, end
        raise ModelError(
            f"{self.name} has no blocks from {first!r} to {last!r}; its blocks are, in order: "
            f"{', '.join(self.blocks)}"
        )

    def _replace(self, block: str, features: jax.Array, x: jax.Array) -> jax.Array:
        if x.shape != features.shape:
            raise ModelError(
                f"{self.name}: block {block!r} takes features {list(x.shape)}, and got "
                f"{list(features.shape)}"
            )
        return features

    def _block_of_norm(self, path: str) -> int:
        return (self._cuts.norms or {}).get(path, 0)

    @cached_property
    def _cuts(self) -> Blocks:
        """The blocks of the module, from the paths in `blocks` or the names of all blocks."""

        def run(
            params: Tree, stats: Tree, images: jax.Array, key: jax.Array | None, edits: InputEdits
        ) -> tuple[jax.Array, Tree]:
            mode: NormMode = "running" if key is None else "batch"
            modes = dict.fromkeys(self._norm_layers, mode)
            return self._call(params, stats, images, modes, None, key, edits)

        cutter = Cutter(self.name, run, self.init, self._shapes, self.shape, self._submodules())
        return cutter.blocks(self.blocks, self.head, self._submodules(DROPOUTS))

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the network."""

    @abstractmethod
    def _init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
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
        edits: InputEdits,
    ) -> tuple[jax.Array, Tree]:
        """Returns the module's output for the images, and its statistics after the call."""

    @abstractmethod
    def _submodules(self, kind: tuple[type, ...] = (object,)) -> list[str]:
        """Returns the paths of the submodules, or of the submodules of a kind."""

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
            return self._call(params, stats, images, modes, None, None, InputEdits())[0]

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
