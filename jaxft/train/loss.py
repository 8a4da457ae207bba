"""The loss of a step: of soft targets, on images that are erased and mixed."""

import zlib
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped

from jaxft.data.mixup import cutmix, mixup, mixup_or_cutmix, soft_targets
from jaxft.data.random_erasing import erase, erasing_boxes
from jaxft.losses import LossChoice, example_losses


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss of a batch; by default plain cross entropy.

    Attributes:
      function: loss of an example.
      label_smoothing: share of each target that is spread over all classes.
      class_weights: a weight for each class, as torch's `CrossEntropyLoss(weight=...)`. The mean
        divides by the sum of the images' weights; with mixup or cutmix by the number of images.
        Any other loss of an image is multiplied by the weight of its class.
      reduction: `sum` minimises the sum over the batch, as torch's `reduction="sum"`.
      random_erasing: probability that a box of an image is erased.
      mixup, cutmix: alphas of their Beta distributions; 0 turns them off. With both, a coin flip
        chooses one for each batch.
      multi_label: targets are 0 or 1 for each class, and each image weighs 1.
    """

    function: LossChoice = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    multi_label: bool = False

    @property
    def changes_images(self) -> bool:
        """Whether it erases or mixes images."""
        return bool(self.random_erasing or self.mixup or self.cutmix)

    def erase_and_mix(
        self,
        images: Shaped[ArrayLike, "b ..."],
        target: Int[ArrayLike, " b"] | Int[ArrayLike, "b {num_classes}"],
        mask: Bool[ArrayLike, " b"],
        num_classes: int,
        key: PRNGKeyArray,
    ) -> tuple[
        Shaped[jax.Array, "b ..."], Float[jax.Array, "b {num_classes}"] | Int[jax.Array, " b"]
    ]:
        """Erases and mixes normalised images `[b h w c]`; returns them and their targets.

        Targets are probabilities, not yet smoothed, or `target` itself if the loss is plain cross
        entropy. Unless `changes_images`, images of any type and features return as they are.
        """
        images = jnp.asarray(images)
        if self.random_erasing:
            count, height, width, _ = images.shape
            drawn = _named(key, "erasing")
            boxes = erasing_boxes(drawn, count, height, width, probability=self.random_erasing)
            images = erase(images, boxes)
        if self.function == "cross_entropy" and not (
            self.mixup or self.cutmix or self.label_smoothing or self.class_weights
        ):
            return images, jnp.asarray(target)
        target, mask = jnp.asarray(target), jnp.asarray(mask)
        targets = target.astype(float) if self.multi_label else soft_targets(target, num_classes)
        key = _named(key, "mixing")
        if self.mixup and self.cutmix:
            return mixup_or_cutmix(
                key, images, targets, mask, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix
            )
        if self.mixup:
            return mixup(key, images, targets, mask, alpha=self.mixup)
        if self.cutmix:
            return cutmix(key, images, targets, mask, alpha=self.cutmix)
        return images, targets

    def losses(
        self,
        logits: Float[jax.Array, "b k"],
        targets: Float[jax.Array, "b k"] | Int[jax.Array, " b"],
    ) -> Float[jax.Array, " b"]:
        """Returns the loss of each row.

        Divided by the sum of `weights`, the sum of the cross entropies is the mean of torch's
        `CrossEntropyLoss(weight=..., label_smoothing=...)`.
        """
        if targets.ndim == 1:
            return example_losses(self.function, logits, targets)
        smoothed = (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[-1]
        weights = self._class_weights(targets)
        if self.function != "cross_entropy":
            losses = example_losses(self.function, logits, smoothed)
            return losses * (targets @ weights) if self.class_weights else losses
        return -jnp.sum(weights * smoothed * jax.nn.log_softmax(logits), axis=-1)

    def weights(
        self, targets: Float[jax.Array, "b k"] | Int[jax.Array, " b"]
    ) -> Float[jax.Array, " b"]:
        """Returns the weight of each row: the weight of its class.

        With mixup or cutmix a row has several classes and the weight 1, as in torch's loss of
        probabilities, whose mean divides by the number of rows.
        """
        if targets.ndim == 1 or self.mixup or self.cutmix or self.multi_label:
            return jnp.ones(len(targets), jnp.float32)
        return targets @ self._class_weights(targets)

    def reduced(
        self, mean: Float[jax.Array, ""], total: Float[jax.Array, ""]
    ) -> Float[jax.Array, ""]:
        """Returns the loss to minimise, given a mean (or a part of it) and the sum of `weights`."""
        return mean * total if self.reduction == "sum" else mean

    def _class_weights(self, targets: Float[jax.Array, "b k"]) -> Float[jax.Array, " k"]:
        if self.class_weights is None:
            return jnp.ones(targets.shape[-1], targets.dtype)
        return jnp.asarray(self.class_weights, targets.dtype)


def _named(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns a separate key for each use, as the layers of a network draw theirs by path."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
