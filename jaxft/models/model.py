"""The `Model` protocol: a network as pure functions on plain trees."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PRNGKeyArray

from jaxft.models.key_map import KeyMap

Tree = Any
"""Nested dicts with string keys and arrays at the leaves."""

NormMode = Literal["running", "batch", "batch_fixed", "batch_replace"]
"""The statistics that a norm layer uses.

`running`: normalises with the running statistics and leaves them unchanged.
`batch`: normalises with batch statistics and updates the running statistics.
`batch_fixed`: normalises with batch statistics and leaves the running statistics unchanged.
`batch_replace`: normalises with batch statistics and replaces the running statistics by them; for
`jaxft.train.norm_statistics`, not for training.

A layer's label, not its mode, decides whether its scale and bias train. Five combinations are used:

| scale, bias | mode          | used by                                                       |
|-------------|---------------|---------------------------------------------------------------|
| frozen      | `batch`       | PyTorch's tutorial, Finetuning Scheduler (`batch`)            |
| frozen      | `running`     | Keras, timm, detection (`frozen_eval`)                        |
| trained     | `batch`       | fastai, Lightning with `train_bn=True` (`train_all`)          |
| frozen      | `batch_fixed` | Lightning with `train_bn=False` (`frozen_batch`)              |
| trained     | `running`     | linear probing then fine-tuning, surgical fine-tuning (`eval`)|
"""

UPDATING: frozenset[NormMode] = frozenset({"batch", "batch_replace"})
"""Modes that change the running statistics."""

OPTIONS = (
    "stride_in_1x1", "concat_pool", "head_layers", "binary", "dropout", "drop_path", "dtype",
)  # fmt: skip
"""Keyword arguments of `jaxft.models.create` that define a network, besides `num_classes`."""

STORED_OPTIONS = (*OPTIONS, "image_size")
"""Options that weights files record; the image size is also the recipe's, for any network."""

Norms = NormMode | Mapping[str, NormMode]
"""One mode for all norm layers, or a mode per norm layer by its path (`layer4.0.bn1`)."""


Replicas = int | Mesh
"""Equal parts of a batch with separate batch statistics: their number, or a mesh [parts, devices]
of the devices that hold the rows of each part."""


class Architecture(Protocol):
    """Structure of a network, known before any array exists."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, from input to output; the last one is the head."""
        ...

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block, in the order of `blocks`."""
        ...

    @property
    def head(self) -> str:
        """Path of the classifier's parameters, such as `fc`."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        ...


@runtime_checkable
class Model(Architecture, Protocol):
    """A network that jaxft can train.

    `params` holds the arrays that gradients can update; `stats` holds the running statistics of the
    norm layers. Both are nested dicts with string keys; dotted paths name their leaves. Networks of
    the registry use PyTorch's names down to the module (`layer4.0.conv1.kernel`). `Linen` and `NNX`
    turn a Flax module into a `Model`.
    """

    @property
    def name(self) -> str:
        """Name of the network in the registry, or its class name."""
        ...

    @property
    def key_map(self) -> KeyMap | None:
        """Names in weights files with torch's names and layouts; None if files have the paths."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Arguments of `create` that build this network; weights files record them."""
        ...

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)`, in the dtypes that every run of this network uses."""
        ...

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
        """Applies the blocks from `first` to `last`, both included; by default all blocks.

        Args:
          params: all parameters of the network.
          stats: all running statistics of the network.
          inputs: normalised RGB images `[b h w c]`, or the output of the block before `first`.
          norms: the mode of each norm layer.
          mask: False for padding rows, which batch statistics leave out.
          replicas: parts of the batch with separate batch statistics.
          key: random key for dropout and stochastic depth; None disables both.
          first: the first block to apply.
          last: the last block to apply.

        Returns:
          `(output, stats)`. The output is logits `[b k]` after the head, and features `[b d]` after
          the block before it. Statistics change in layers with one of the `UPDATING` modes.
        """
        ...
