"""Trains in PyTorch and in jaxft and compares every step."""

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
from jaxft.models.nnx_adapter import init_shapes
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.parity.jax_steps import jax_steps, network, programs
from jaxft.parity.report import Report, compare_steps
from jaxft.parity.step import NumpyBatch
from jaxft.parity.torch_steps import TorchStage, torch_steps
from jaxft.recipe import Recipe
from jaxft.stages import Stage
from jaxft.weights.key_maps import torch_tensors

_RTOL = {"float64": 1e-9, "float32": 1e-4}
_RANDOM_FIELDS = ("dropout", "drop_path", "random_erasing", "mixup", "cutmix")


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
    """Trains copies of `module` in PyTorch and in jaxft and reports the first step that differs.

    Both trainings start from the module's weights and use `batches`, in order, as each epoch. The
    recipe sets the length of the stages. There is no augmentation, validation or best epoch.

    Args:
      recipe: the recipe; its network must have the module's names (`layer4.0.conv1`).
      module: a torch module on the CPU that returns logits.
      stages: the PyTorch script's counterpart of each stage of the recipe.
      batches: `(images, targets)`: normalised images [b h w c], floats, and classes [b], integers.
        All batches but the last have the recipe's `batch_size`.
      model: the network; by default the recipe's.
      dtype: compute dtype of both sides. In float32, rounding errors grow even if both sides train
        alike.
      rtol: tolerance, relative to the largest value of each array; by default 1e-9 in float64 and
        1e-4 in float32.

    Raises:
      RecipeError: if a stage uses random numbers, `auto_rgn`, a linear probe or validation, if the
        numbers of stages differ, or if a batch has the wrong size or layout.
      WeightsError: if the module's tensors do not match the network.
    """
    epoch = [NumpyBatch(np.asarray(images, dtype), np.asarray(y)) for images, y in batches]
    _check(recipe, stages, epoch)
    module = copy.deepcopy(module).to(getattr(torch, dtype))
    model = model or network(recipe, _num_classes(module, epoch))
    with jax.enable_x64(dtype == "float64"):
        start = _initial_trees(module, model)
        jax_programs = programs(recipe, model, start, epoch)
        lengths = [program.steps for program in jax_programs]
        return compare_steps(
            torch_steps(module, stages, lengths, epoch, _next_modules(module, model)),
            jax_steps(jax_programs, start, epoch),
            stages=[stage.name for stage in recipe.stages],
            lengths=lengths,
            rtol=_RTOL[dtype] if rtol is None else rtol,
            dtype=dtype,
        )


def _num_classes(module: nn.Module, epoch: Sequence[NumpyBatch]) -> int:
    images = torch.from_numpy(np.moveaxis(epoch[0].images, -1, 1).copy())
    with torch.no_grad():
        logits = copy.deepcopy(module).eval()(images)
    return max(2, logits.shape[-1])  # a single logit separates two classes


def _initial_trees(module: nn.Module, model: Model) -> tuple[Tree, Tree]:
    """Converts the module's weights to `(params, stats)` of the network."""
    tensors = torch_tensors(*init_shapes(model))
    expected = {tensor.name: tensor for tensor in jax.tree.leaves(tensors)}
    actual = {n: x.numpy() for n, x in module.state_dict().items() if x.is_floating_point()}
    mismatched = sorted(
        name
        for name in expected.keys() | actual.keys()
        if name not in expected or name not in actual or expected[name].shape != actual[name].shape
    )
    if mismatched:
        raise WeightsError(
            f"the module does not match {model.name}. Only one of them has these tensors, or "
            f"their shapes differ: {', '.join(mismatched[:8])}{', ...' * (len(mismatched) > 8)}."
        )
    return jax.tree.map(lambda t: jnp.array(t.from_torch(actual[t.name])), tensors)


def _next_modules(module: nn.Module, model: Model) -> dict[str, str]:
    """Returns, for each block but the last, the submodule that receives its output, if any."""
    following = (*model.blocks[1:-1], model.head)
    modules = {name for name, _ in module.named_modules()}
    pairs = zip(model.blocks[:-1], following, strict=True)
    return {block: name for block, name in pairs if name in modules}


def _check(recipe: Recipe, stages: Sequence[TorchStage], epoch: Sequence[NumpyBatch]) -> None:
    if len(stages) != len(recipe.stages):
        raise RecipeError(
            f"the recipe has {len(recipe.stages)} stages, but `stages` has {len(stages)}: pass one "
            "TorchStage for each."
        )
    if recipe.lora:
        raise RecipeError("the recipe has lora; the module has no adapters to compare with.")
    for shape in (batch.images.shape for batch in epoch):
        if len(shape) != 4 or shape[-1] != 3:
            raise RecipeError(f"a batch's images are {list(shape)}; they must be [b h w 3].")
    for stage in recipe.stages:
        _check_stage(recipe, stage, [len(batch.targets) for batch in epoch])


def _check_stage(recipe: Recipe, stage: Stage, sizes: Sequence[int]) -> None:
    """Raises RecipeError if the stage cannot be compared, or not with batches of these sizes."""
    stage_recipe = recipe.during(stage)
    if random := [field for field in _RANDOM_FIELDS if getattr(stage_recipe, field)]:
        raise RecipeError(
            f"stage {stage.name!r} uses {', '.join(random)}, whose random numbers differ between "
            "PyTorch and jaxft; set them to 0."
        )
    if stage.linear_probe or stage.auto_rgn:
        feature = "is a linear probe" if stage.linear_probe else "has auto_rgn"
        raise RecipeError(
            f"stage {stage.name!r} {feature}, which has no counterpart in torch's optimizers; "
            "compare the recipe without it."
        )
    updates = [stage.resolve(pattern, recipe.optimizer) for pattern in stage.train]
    if any(isinstance(update.schedule, ReduceLROnPlateau) for update in updates):
        raise RecipeError(
            f"stage {stage.name!r} has a ReduceLROnPlateau, which needs validation, but `compare` "
            "does not validate; use a schedule with the same learning rates."
        )
    size = stage_recipe.batch_size
    if not sizes or set(sizes[:-1]) - {size} or not 0 < sizes[-1] <= size:
        raise RecipeError(
            f"stage {stage.name!r} has batches of {size}, but `batches` has batches of {sizes}: "
            "all but the last must be full."
        )
