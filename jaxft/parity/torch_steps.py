"""Trains a PyTorch module in stages, as a script does, and records each step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from jaxft.parity.step import Arrays, NumpyBatch, Step

# Keys of torch's optimizer states that hold a moment of each parameter.
_MOMENTS = {
    "momentum_buffer": "momentum",
    "exp_avg": "mean",
    "grad_avg": "mean",
    "exp_avg_sq": "mean square",
    "square_avg": "mean square",
}


def mean_cross_entropy(module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean cross entropy of a batch."""
    return cross_entropy(module(images), targets)


@dataclass(frozen=True)
class TorchStage:
    """One stage of a PyTorch script.

    Attributes:
      begin: `(module, optimizer) -> optimizer`, called at the start of the stage. It sets
        `requires_grad`, calls `train()` or `eval()`, and returns the stage's optimizer: a new one,
        or the given optimizer of the stage before (None in the first stage) with more parameters.
      loss: `(module, images [b c h w], targets [b]) -> loss`, a scalar.
      penalty: `(module) -> penalty`, added to the loss; the counterpart of a recipe's `L2SP`.
      scheduler: `(optimizer) -> scheduler`; None keeps learning rates constant.
      by: whether `scheduler.step()` is called after each epoch or after each step.
      before_update: `(module) -> None`, called between `backward()` and `optimizer.step()`, for
        example to clip gradients.
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
    epoch: Sequence[NumpyBatch],
    next_modules: Mapping[str, str],
) -> Iterator[Step]:
    """Trains `module` through all stages and yields each step.

    Args:
      module: the module, which is trained in place.
      stages: the stages.
      lengths: number of steps of each stage.
      epoch: the batches of one epoch; every epoch is the same.
      next_modules: for each block whose output is recorded, the submodule that receives it.
    """
    dtype = next(module.parameters()).dtype
    outputs = _record_outputs(module, next_modules)
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
            trained = _trained_parameters(module, optimizer)
            grads = {name: _numpy(p.grad) for name, (p, _) in trained.items() if p.grad is not None}
            if stage.before_update:
                stage.before_update(module)
            lr = {name: np.asarray(float(value)) for name, (_, value) in trained.items()}
            optimizer.step()
            yield Step(
                lr=lr,
                outputs={**outputs},
                loss={"loss": _numpy(loss)},
                stats={n: _numpy(x) for n, x in module.named_buffers() if x.is_floating_point()},
                grads=grads,
                moments=_moments(optimizer, trained),
                params={name: _numpy(p) for name, p in module.named_parameters()},
            )
            if scheduler and (stage.by == "step" or (position + 1) % len(epoch) == 0):
                scheduler.step()


def _trained_parameters(
    module: nn.Module, optimizer: Optimizer
) -> dict[str, tuple[nn.Parameter, float]]:
    """Returns each parameter that a step can change, with its learning rate."""
    lrs = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters()
    return {name: (p, lrs[p]) for name, p in named if p.requires_grad and p in lrs}


def _moments(optimizer: Optimizer, trained: Mapping[str, tuple[nn.Parameter, float]]) -> Arrays:
    return {
        f"{name}, {moment}": _numpy(optimizer.state[p][key])
        for name, (p, _) in trained.items()
        for key, moment in _MOMENTS.items()
        if optimizer.state.get(p, {}).get(key) is not None
    }


def _record_outputs(module: nn.Module, next_modules: Mapping[str, str]) -> Arrays:
    """Registers hooks that store the output of each block in the returned dict.

    Outputs are `[b h w c]` or `[b k]`; the module's output is called `logits`.
    """
    outputs: Arrays = {}

    def store(block: str, output: Tensor) -> None:
        array = _numpy(output)
        outputs[block] = np.moveaxis(array, 1, -1) if array.ndim == 4 else array

    for block, name in next_modules.items():
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, block=block: store(block, inputs[0])
        )
    module.register_forward_hook(lambda _, inputs, output: store("logits", output))
    return outputs


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()
