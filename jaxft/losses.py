"""Losses of single examples: cross entropy, binary cross entropy, focal loss, or the user's own."""

import math
import reprlib
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from jaxft import example_function
from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.user_function import find

NAMES = ("cross_entropy", "bce")


@checked(reduction="it is a field of the recipe")
@dataclass(frozen=True)
class Focal:
    """Focal loss of Lin et al. 2017 (arXiv:1708.02002), one sigmoid per class.

    As torchvision's `sigmoid_focal_loss(..., reduction="mean")`: for the probability p of a class
    and its target t, the binary cross entropy times (1 - p_t)^gamma, where p_t = p t + (1 - p)
    (1 - t), averaged over the classes. `Focal(gamma=0)` is `bce`.

    Attributes:
      gamma: exponent; larger values give less weight to examples that are classified well.
      alpha: weight from 0 to 1 of a class that is present, where an absent one weighs 1 - alpha;
        None: both weigh 1. Lin et al. use 0.25.
    """

    gamma: float = 2.0
    alpha: float | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.gamma < math.inf:
            wrong.append(f"gamma is {self.gamma}; it must be at least 0 and finite")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            wrong.append(f"alpha is {self.alpha}; it must be from 0 to 1, or None")
        if wrong:
            raise RecipeError(f"Focal: {'; '.join(wrong)}.")

    def losses(
        self, logits: Float[jax.Array, "b k"], targets: Float[jax.Array, "b k"]
    ) -> Float[jax.Array, " b"]:
        """Returns the loss of each row.

        Example:
          >>> logits, targets = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
          >>> Focal(gamma=2.0).losses(logits, targets).round(4).tolist()  # log(2) / 4
          [0.17329999804496765]
        """
        # log(1 - p_t), whose exponential has a gradient even where 1 - p_t rounds to 0.
        log_rest = jnp.logaddexp(
            jax.nn.log_sigmoid(logits) + jnp.log1p(-targets),
            jax.nn.log_sigmoid(-logits) + jnp.log(targets),
        )
        losses = optax.sigmoid_binary_cross_entropy(logits, targets) * jnp.exp(
            self.gamma * log_rest
        )
        if self.alpha is not None:
            losses *= self.alpha * targets + (1 - self.alpha) * (1 - targets)
        return losses.mean(-1)


LossChoice = str | Focal
"""Loss of an example.

- `cross_entropy`: of the softmax, as torch's `CrossEntropyLoss`.
- `bce`: binary cross entropy of each class, averaged over the classes, so that the loss of a batch
  is torch's `BCEWithLogitsLoss` and timm's `BinaryCrossEntropy`.
- `Focal(gamma, alpha)`.
- `MODULE:FUNCTION`: a function of the user, see `jaxft.example_function`.
"""


def check(loss: object, *, binary: bool = False) -> None:
    """Raises RecipeError if there is no such loss; imports the module of a user's function.

    `binary`: whether the network has a single logit for two classes.
    """
    if binary and (loss == "bce" or isinstance(loss, Focal)):
        raise RecipeError(
            f"loss is {loss!r}, which has a sigmoid for each of two classes, and binary has one "
            "for both. Set binary to False, or leave loss at cross_entropy, which is then the "
            "binary cross entropy of the one logit."
        )
    if isinstance(loss, Focal) or loss in NAMES:
        return
    if not (isinstance(loss, str) and ":" in loss):
        raise RecipeError(
            f"loss is {reprlib.repr(loss)}; it must be {', '.join(NAMES)}, Focal(...), or "
            "MODULE:FUNCTION, which names a function of yours, because a run saves its recipe as "
            "YAML."
        )
    try:
        find(loss)
    except RecipeError as error:
        raise RecipeError(f"loss is {error}") from error


def check_output(loss: LossChoice, num_classes: int) -> None:
    """Checks a user's function for this number of classes; see `jaxft.example_function.check`."""
    if isinstance(loss, str) and loss not in NAMES:
        example_function.check(loss, "loss", num_classes, has_gradient=True)


def example_losses(
    loss: LossChoice,
    logits: Float[jax.Array, "b k"],
    targets: Float[jax.Array, "b k"] | Int[jax.Array, " b"],
) -> Float[jax.Array, " b"]:
    """Returns the loss of each row.

    Args:
      loss: which one.
      logits: a row per example.
      targets: classes, or probabilities of all classes.

    Example:
      >>> example_losses("bce", jnp.zeros((1, 3)), jnp.array([2])).round(4).tolist()  # log(2)
      [0.6930999755859375]
    """
    if loss == "cross_entropy" and targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    if isinstance(loss, Focal):
        return loss.losses(logits, targets)
    if loss == "cross_entropy":
        return optax.softmax_cross_entropy(logits, targets)
    if loss == "bce":
        return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
    return example_function.call(loss, logits, targets)
