"""A network with LoRA adapters as a `Model`, so that stages select them like other parameters.

`params` holds `lora_a` and `lora_b` beside the `kernel` of each module with an adapter, at paths
such as `layer4.0.conv1.lora_a`. `apply` merges them and applies the network, which never sees
them. The head has no adapter, because a new head trains as a whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxft.errors import PatternError, RecipeError
from jaxft.labels import paths
from jaxft.lora_adapters import LORA_A, LORA_B, Adapters, is_adapter, lora, merge_lora
from jaxft.models.key_map import KeyMap
from jaxft.models.model import Model, Norms, Replicas, Tree
from jaxft.models.nnx_adapter import init_shapes

_KERNEL = "kernel"  # Flax's name in dense layers and convolutions


@dataclass(frozen=True)
class LoraModel:
    """A network with adapters.

    Attributes:
      network: the network without adapters.
      ranks: pairs of a pattern and the rank of the adapters that it selects.
      alpha: see `jaxft.merge_lora`.

    Raises:
      RecipeError: `jaxft.lora` refuses a pattern or a rank, a pattern selects only the head, alpha
        is not positive, or the network has parameters of these names.
    """

    network: Model
    ranks: tuple[tuple[str, int], ...]
    alpha: float | None = None

    def __post_init__(self) -> None:
        params, _ = init_shapes(self.network)
        if taken := [path for path in paths(params) if is_adapter(path)]:
            raise RecipeError(
                f"{self.name} has parameters called {LORA_A} or {LORA_B} already, such as "
                f"{taken[0]}: give them a learning rate and leave lora out, or rename them."
            )
        jax.eval_shape(self._adapters, params, jax.random.key(0))
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RecipeError(f"lora_alpha is {self.alpha}; it must be positive and finite.")

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.network.name

    @property
    def key_map(self) -> KeyMap | None:
        """Names in weights files of the network."""
        return self.network.key_map

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the network."""
        return self.network.options

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the network's blocks."""
        return self.network.blocks

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns of the network's blocks, which select their adapters too."""
        return self.network.block_patterns

    @property
    def head(self) -> str:
        """Path of the classifier's parameters."""
        return self.network.head

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.network.num_classes

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)` of the network, with fresh adapters."""
        params, stats = self.network.init(key)
        return self.with_adapters(params, key), stats

    def with_adapters(self, params: Tree, key: PRNGKeyArray) -> Tree:
        """Returns parameters of the network with fresh adapters, which change no output."""
        return _join_adapters(params, self._adapters(params, jax.random.fold_in(key, 1)))

    def merge(self, params: Tree) -> Tree:
        """Returns the parameters of the network with the adapters merged into the kernels."""
        return merge_lora(*split_adapters(params), alpha=self.alpha)

    def merge_and_reset(self, params: Tree) -> Tree:
        """Merges the adapters into the kernels and sets their `lora_b` to zero."""
        _, adapters = split_adapters(params)
        zeros = {path: x | {LORA_B: jnp.zeros_like(x[LORA_B])} for path, x in adapters.items()}
        return _join_adapters(self.merge(params), zeros)

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
        """Merges the adapters and applies blocks of the network; see `Model.apply`."""
        return self.network.apply(
            self.merge(params), stats, inputs,
            norms=norms, mask=mask, replicas=replicas, key=key, first=first, last=last,
        )  # fmt: skip

    def _adapters(self, params: Tree, key: PRNGKeyArray) -> Adapters:
        """Draws adapters for the selected kernels outside the head."""

        def kernel_or_none(path: Any, leaf: jax.Array) -> jax.Array | None:
            *module, name = (key.key for key in path)
            in_head = module[: len(head)] == head
            return leaf if name == _KERNEL and not in_head else None

        head = self.head.split(".")
        kernels = jax.tree_util.tree_map_with_path(kernel_or_none, params)
        try:
            return lora(kernels, dict(self.ranks), key=key)
        except PatternError as error:
            raise RecipeError(
                f"{error}\nAdapters are for the arrays called {_KERNEL!r} outside the head, "
                f"{self.head!r}, which trains as a whole."
            ) from error


def with_lora(network: Model, ranks: Mapping[str, int], alpha: float | None) -> Model:
    """Returns the network with adapters, or itself if there are no ranks.

    Raises:
      RecipeError: see `LoraModel`.
    """
    return LoraModel(network, tuple(ranks.items()), alpha) if ranks else network


def without_lora(model: Model) -> Model:
    """Returns the network without its adapters, if it has any."""
    return model.network if isinstance(model, LoraModel) else model


def merged_params(params: Tree, recipe: Mapping[str, Any]) -> Tree:
    """Returns the parameters of a checkpoint in NumPy arrays without adapters.

    Args:
      params: NumPy arrays.
      recipe: fields of the run's recipe, as a checkpoint's header holds them.
    """
    if not recipe.get("lora"):
        return params
    return jax.device_get(merge_lora(*split_adapters(params), alpha=recipe["lora_alpha"]))


def split_adapters(params: Tree) -> tuple[Tree, Adapters]:
    """Splits the parameters of a `LoraModel` into its network's and the adapters.

    Example:
      >>> split_adapters({"fc": {"kernel": 1, "lora_a": 2, "lora_b": 3}})
      ({'fc': {'kernel': 1}}, {'fc.kernel': {'lora_a': 2, 'lora_b': 3}})
    """
    adapters: Adapters = {}

    def split(tree: Tree, prefix: str) -> Tree:
        if LORA_A in tree:
            adapters[f"{prefix}{_KERNEL}"] = {LORA_A: tree[LORA_A], LORA_B: tree[LORA_B]}
        return {
            name: split(child, f"{prefix}{name}.") if isinstance(child, dict) else child
            for name, child in tree.items()
            if name not in (LORA_A, LORA_B)
        }

    return split(params, ""), adapters


def _join_adapters(params: Tree, adapters: Adapters) -> Tree:
    """Puts each adapter beside its kernel; inverts `split_adapters`."""

    def join(tree: Tree, prefix: str) -> Tree:
        children = {
            name: join(child, f"{prefix}{name}.") if isinstance(child, dict) else child
            for name, child in tree.items()
        }
        return children | adapters.get(f"{prefix}{_KERNEL}", {})

    return join(params, "")
