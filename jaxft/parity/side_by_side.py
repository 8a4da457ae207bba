"""Both trainings side by side, until they differ."""

import copy
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from jaxft.errors import RecipeError, WeightsError
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.parity.jax_steps import jax_steps, network, programs
from jaxft.parity.report import Report, follow
from jaxft.parity.step import Rows
from jaxft.parity.torch_steps import TorchStage, torch_steps
from jaxft.recipe import Recipe
from jaxft.weights.key_maps import torch_tensors

_RTOL = {"float64": 1e-9, "float32": 1e-4}
_RANDOM = ("dropout", "drop_path", "erasing", "mixup", "cutmix")


def compare(
    recipe: Recipe,
    module: nn.Module,
    stages: Sequence[TorchStage],
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    model: Model | None = None,
    dtype: Literal["float64", "float32"] = "float64",
    rtol: float | None = None,
) -> Report:
    """Trains `module` and the recipe's network alike and tells where they first differ.

    Both start from the module's weights, in copies. An epoch is all of `batches`, in order; each
    stage is as long as the recipe says. Neither augments, validates, or chooses a best epoch.

    Args:
      recipe: its network must have the module's names (`layer4.0.conv1`).
      module: a torch module that gives logits; on the CPU.
      stages: what the PyTorch script does in each of the recipe's stages.
      batches: `(images, targets)`: normalised floats [b h w c] and classes, int [b]; as many as
        the recipe's batch_size, but for the last one.
      model: the network, if not the one that the recipe names.
      dtype: what both compute in. In float32 even equal trainings drift apart by rounding.
      rtol: what is no difference yet, relative to the largest value of each array; by default
        1e-9 in float64 and 1e-4 in float32.

    Raises:
      RecipeError: a recipe that is random, takes no plain steps, or waits for validation; other
        than one torch stage for each; batches of other sizes or layouts.
      WeightsError: the module's tensors are not those of the network.
    """
    epoch = [Rows(np.asarray(images, dtype), np.asarray(classes)) for images, classes in batches]
    _check(recipe, stages, epoch)
    module = copy.deepcopy(module).to(getattr(torch, dtype))
    model = model or network(recipe, _num_classes(module, epoch))
    with jax.enable_x64(dtype == "float64"):
        start = _start(module, model)
        ours = programs(recipe, model, start, epoch)
        lengths = [program.steps for program in ours]
        return follow(
            torch_steps(module, stages, lengths, epoch, _cuts(module, model)),
            jax_steps(ours, start, epoch),
            stages=[stage.name for stage in recipe.stages],
            lengths=lengths,
            rtol=_RTOL[dtype] if rtol is None else rtol,
            dtype=dtype,
        )


def _num_classes(module: nn.Module, epoch: Sequence[Rows]) -> int:
    images = torch.from_numpy(np.moveaxis(epoch[0].images, -1, 1).copy())
    with torch.no_grad():
        logits = copy.deepcopy(module).eval()(images)
    return max(2, logits.shape[-1])  # a single logit tells two classes apart


def _start(module: nn.Module, model: Model) -> tuple[Tree, Tree]:
    """The module's weights as ours."""
    named = torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))
    wanted = {tensor.name: tensor for tensor in jax.tree.leaves(named)}
    found = {n: x.numpy() for n, x in module.state_dict().items() if x.is_floating_point()}
    wrong = sorted(
        name
        for name in wanted.keys() | found.keys()
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    )
    if wrong:
        raise WeightsError(
            f"the module is not {model.name}: one lacks, or has in another shape, "
            f"{', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}."
        )
    return jax.tree.map(lambda t: jnp.array(t.from_torch(found[t.name])), named)


def _cuts(module: nn.Module, model: Model) -> dict[str, str]:
    """Each block but the last by the submodule that follows it, where the module has one."""
    following = (*model.blocks[1:-1], model.head)
    modules = {name for name, _ in module.named_modules()}
    pairs = zip(model.blocks[:-1], following, strict=True)
    return {block: name for block, name in pairs if name in modules}


def _check(recipe: Recipe, stages: Sequence[TorchStage], epoch: Sequence[Rows]) -> None:
    if len(stages) != len(recipe.stages):
        raise RecipeError(f"the recipe has {len(recipe.stages)} stages, PyTorch {len(stages)}.")
    for shape in (rows.images.shape for rows in epoch):
        if len(shape) != 4 or shape[-1] != 3:
            raise RecipeError(f"a batch's images are {list(shape)}; they must be [b h w 3].")
    for stage in recipe.stages:
        during = recipe.during(stage)
        if random := [field for field in _RANDOM if getattr(during, field)]:
            raise RecipeError(
                f"stage {stage.name!r}: {', '.join(random)} would be drawn differently on either "
                "side; compare without, with 0."
            )
        if stage.solver or stage.relative_rates:
            what = "is solved" if stage.solver else "has relative_rates"
            raise RecipeError(
                f"stage {stage.name!r} {what}, which no optimizer of torch's does; compare without."
            )
        rules = [stage.resolve(pattern, recipe.optimizer) for pattern in stage.train]
        if any(isinstance(rule.schedule, ReduceLROnPlateau) for rule in rules):
            raise RecipeError(
                f"stage {stage.name!r} has a ReduceLROnPlateau, and nothing is validated here; "
                "compare with the rates that it arrives at."
            )
        sizes = [len(rows.targets) for rows in epoch]
        size = during.batch_size
        if not sizes or set(sizes[:-1]) - {size} or not 0 < sizes[-1] <= size:
            raise RecipeError(
                f"stage {stage.name!r} has batches of {size}, and those given are of {sizes}: all "
                "but the last must be full."
            )
