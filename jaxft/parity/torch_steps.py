"""The PyTorch half: a module trained in stages, as a script does it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from jaxft.parity.step import Arrays, Rows, Step

# What torch's optimizers call what they remember of each parameter.
_MOMENTS = {
    "momentum_buffer": "momentum",
    "exp_avg": "mean",
    "grad_avg": "mean",
    "exp_avg_sq": "mean square",
    "square_avg": "mean square",
}


def mean_cross_entropy(module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loss of most recipes."""
    return cross_entropy(module(images), targets)


@dataclass(frozen=True)
class TorchStage:
    """What a PyTorch script does in one stage.

    Attributes:
      begin: `(module, optimizer) -> optimizer`, at the stage's start: sets `requires_grad`, calls
        `train()` or `eval()`, and makes the stage's optimizer, or extends that of the stage
        before (None in the first).
      loss: `(module, images [b c h w], targets [b]) -> loss`, a scalar.
      penalty: `(module) -> penalty`, added to the loss, where the recipe has an `Anchor`.
      scheduler: `(optimizer) -> scheduler`; none: rates are constant.
      by: whether `scheduler.step()` follows each epoch, or each step.
      before_update: called with the module between `backward()` and `optimizer.step()`, where
        gradients are clipped.
    """

    begin: Callable[[nn.Module, Optimizer | None], Optimizer]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = mean_cross_entropy
    penalty: Callable[[nn.Module], Tensor] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    by: Literal["epoch", "step"] = "epoch"
    before_update: Callable[[nn.Module], object] | None = None


def torch_steps(
    module: nn.Module,
    stages: Sequence[TorchStage],
    lengths: Sequence[int],
    epoch: Sequence[Rows],
    cuts: Mapping[str, str],
) -> Iterator[Step]:
    """Trains `module` for `lengths` steps of each stage, `epoch` over and over.

    `cuts` are the blocks by the submodule that takes their output; there is none for the last.
    """
    dtype = next(module.parameters()).dtype
    outputs = _watch(module, cuts)
    optimizer: Optimizer | None = None
    for stage, length in zip(stages, lengths, strict=True):
        optimizer = stage.begin(module, optimizer)
        scheduler = stage.scheduler(optimizer) if stage.scheduler else None
        for position in range(length):
            images, targets = epoch[position % len(epoch)]
            outputs.clear()
            optimizer.zero_grad()
            loss = stage.loss(
                module,
                torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(dtype),
                torch.from_numpy(np.asarray(targets, np.int64)),
            )
            (loss + stage.penalty(module) if stage.penalty else loss).backward()
            trains = _trains(module, optimizer)
            grads = {name: _numpy(p.grad) for name, (p, _) in trains.items() if p.grad is not None}
            if stage.before_update:
                stage.before_update(module)
            rates = {name: np.asarray(float(rate)) for name, (_, rate) in trains.items()}
            optimizer.step()
            yield Step(
                rates=rates,
                outputs={**outputs},
                loss={"loss": _numpy(loss)},
                stats={n: _numpy(x) for n, x in module.named_buffers() if x.is_floating_point()},
                grads=grads,
                moments=_moments(optimizer, trains),
                params={name: _numpy(p) for name, p in module.named_parameters()},
            )
            if scheduler and (stage.by == "step" or (position + 1) % len(epoch) == 0):
                scheduler.step()


def _trains(module: nn.Module, optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, float]]:
    """The parameters that a step would change, and their rates."""
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters()
    return {name: (p, rates[p]) for name, p in named if p.requires_grad and p in rates}


def _moments(optimizer: Optimizer, trains: Mapping[str, tuple[nn.Parameter, float]]) -> Arrays:
    return {
        f"{name}, {moment}": _numpy(optimizer.state[p][key])
        for name, (p, _) in trains.items()
        for key, moment in _MOMENTS.items()
        if optimizer.state.get(p, {}).get(key) is not None
    }


def _watch(module: nn.Module, cuts: Mapping[str, str]) -> Arrays:
    """The outputs of the blocks, each time the module is called; [b h w c] or [b k]."""
    seen: Arrays = {}

    def keep(block: str, output: Tensor) -> None:
        array = _numpy(output)
        seen[block] = np.moveaxis(array, 1, -1) if array.ndim == 4 else array

    for block, name in cuts.items():
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, block=block: keep(block, inputs[0])
        )
    module.register_forward_hook(lambda _, inputs, output: keep("logits", output))
    return seen


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()
