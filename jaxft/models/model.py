"""The boundary between a network and everything else: pure functions on plain trees."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
from jax.typing import ArrayLike

Tree = Any
"""Nested dicts with string keys and arrays at the leaves."""

NormMode = Literal["running", "batch", "batch_fixed"]
"""`running`: normalise with the running statistics and leave them as they are.
`batch`: normalise with the batch's statistics and move the running ones towards them.
`batch_fixed`: normalise with the batch's statistics and leave the running ones as they are.
Whether a layer's scale and bias train is its label's business; five combinations are in use:

| scale, bias | mode          | used by                                                       |
|-------------|---------------|---------------------------------------------------------------|
| frozen      | `batch`       | PyTorch's tutorial, Finetuning Scheduler (A)                  |
| frozen      | `running`     | Keras, timm, detection (B)                                    |
| trained     | `batch`       | fastai, Lightning with `train_bn=True` (C)                    |
| frozen      | `batch_fixed` | Lightning with `train_bn=False` (D)                           |
| trained     | `running`     | linear probing then fine-tuning, surgical fine-tuning (E)     |
"""

OPTIONS = (
    "stride_in_1x1", "concat_pool", "head_layers", "binary", "dropout", "drop_path", "dtype",
)  # fmt: skip
"""Keyword arguments of `jaxft.models.create` that shape a network, beside `num_classes`."""

Norms = NormMode | Mapping[str, NormMode]
"""One mode for the whole network, or one for each norm layer by its path (`layer4.0.bn1`)."""


class Outline(Protocol):
    """What is known of a network without any array."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The network's steps, from input to output; the last one is the head."""
        ...

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """The patterns that select each block's parameters, in the order of `blocks`."""
        ...

    @property
    def head(self) -> str:
        """The path of the classifier's parameters, e.g. `fc`."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        ...


class Model(Outline, Protocol):
    """A network as the trainer sees it.

    `params` are what a gradient can reach; `stats` are the running statistics of the norm
    layers. Both are nested dicts with string keys whose dotted paths name the network's
    parts; ours do as PyTorch does, down to the module (`layer4.0.conv1.kernel`). `Linen` and
    `NNX` make such a network of a module of the user's own.
    """

    @property
    def name(self) -> str:
        """What the registry, or the user, calls this network."""
        ...

    @property
    def torch_named(self) -> bool:
        """Whether weights files have torch's names and layouts for it, or just its own paths."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that build this network from its name; weights files record them."""
        ...

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Returns fresh `(params, stats)`. Their dtypes are those of every run of this network."""
        ...

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
        """Runs the blocks `first` to `last` (inclusive; all of them by default).

        `inputs` are images `[b h w c]`, RGB and normalised, or the output of the block before
        `first`. Rows where `mask` `[b]` is False are padding: they enter no statistics. Batch
        statistics are of the whole batch, or with `replicas` of so many equal parts of it. `key`
        draws dropout and stochastic depth; without one, nothing is dropped.
        Returns the output of `last` (logits `[b k]` for the head; of the block before it the
        features `[b d]`) and the new `stats`, which are `stats` itself wherever `norms` does not
        say `batch`.
        """
        ...
