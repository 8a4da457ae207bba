"""Optimizers as torch defines them, one per group, and their state across re-labelling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import optax

from jaxft.errors import LabelError
from jaxft.labels import FROZEN, Tree, same_structure


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD`: decay joins the gradient, the rate stays outside the momentum buffer."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    rule: Literal["sgd"] = "sgd"

    def direction(self) -> optax.GradientTransformation:
        """The update before the learning rate is applied."""
        steps = [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
        if self.momentum:
            steps.append(optax.trace(decay=self.momentum, nesterov=self.nesterov))
        return optax.chain(*steps) if steps else optax.identity()


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam`: decay is added to the gradient before the moments."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    rule: Literal["adam"] = "adam"

    def direction(self) -> optax.GradientTransformation:
        """The update before the learning rate is applied."""
        decay = [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
        return optax.chain(*decay, optax.scale_by_adam(self.b1, self.b2, self.eps))


@dataclass(frozen=True)
class AdamW:
    """`torch.optim.AdamW`: decay acts on the parameters alone, times the rate (default 1e-2)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rule: Literal["adamw"] = "adamw"

    def direction(self) -> optax.GradientTransformation:
        """The update before the learning rate is applied."""
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, optax.add_decayed_weights(self.weight_decay))


Optimizer = SGD | Adam | AdamW


def rated(optimizer: Optimizer, rate: float) -> optax.GradientTransformation:
    """One group's transform: the rule and its rate, kept apart so that `carry` can tell them."""
    return optax.named_chain(
        ("rule", optimizer.direction()), ("rate", optax.scale_by_learning_rate(rate))
    )


def multi_transform(
    transforms: Mapping[str, optax.GradientTransformation], labels: Tree
) -> optax.GradientTransformation:
    """`optax.multi_transform` that freezes what is labelled `frozen` and checks both sides.

    Initialise it with the full parameters; update it with gradients of the trainable half
    (`None` where frozen) or of everything.

    Raises:
      LabelError: a label without a transform, or a transform without a label.
    """
    used = dict.fromkeys(jax.tree.leaves(labels))
    missing = [name for name in used if name != FROZEN and name not in transforms]
    unused = [name for name in transforms if name not in used]
    if FROZEN in transforms:
        raise LabelError(
            f"{FROZEN!r} is reserved: what it labels does not train. Rename the group."
        )
    if missing or unused:
        raise LabelError(
            f"labels and transforms do not agree: labels without a transform {missing}, "
            f"transforms without a label {unused}."
        )
    # A label tree can be callable (a module of strings), and optax would call it.
    return optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, lambda _: labels)


def carry(old: optax.OptState, new: optax.OptState) -> optax.OptState:
    """The new stage's state, with the rules' state of all groups that go on training.

    Like torch's `add_param_group`: who stays keeps moments and count, who joins starts afresh.
    Only the rule is carried, never the rate's position: a schedule starts with its stage. A
    group whose optimizer has changed starts afresh too.

    Args:
      old: the state of the stage that ends, of a `multi_transform` over `rated` groups.
      new: the fresh state of the stage that begins.
    """
    states = dict(new.inner_states)
    for group in states.keys() & old.inner_states.keys() - {FROZEN}:
        before, fresh = old.inner_states[group].inner_state, states[group].inner_state
        if same_structure(before["rule"], fresh["rule"]):
            kept = type(fresh)({**fresh, "rule": before["rule"]})
            states[group] = states[group]._replace(inner_state=kept)
    return new._replace(inner_states=states)
