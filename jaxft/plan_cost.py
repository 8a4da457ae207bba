"""Cost of each stage of a recipe before it runs: computation, time, memory, communication.

The stages are compiled for devices that need not exist (`jaxft.topology`). Neither images nor
weights are read.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxft import open_recipe
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.data.arrays import ArraySource
from jaxft.devices import Devices, cache_share
from jaxft.errors import ParallelError, RecipeError
from jaxft.hlo_cost import HloCost, hlo_cost
from jaxft.labels import Tree, partition
from jaxft.models import Model
from jaxft.models.lora_model import without_lora
from jaxft.models.nnx_adapter import expected_preprocessing, init_shapes
from jaxft.recipe import Recipe
from jaxft.recipe_file import resolve
from jaxft.topology import Chip, Topology
from jaxft.train.compiled_stage import (
    CompiledStage,
    compile_augmentation,
    compile_image_evaluation,
    compile_stage,
)
from jaxft.train.stage_program import StageProgram, build_programs
from jaxft.train.state import opt_state_shapes

T = TypeVar("T")

_EACH_STEP = "augmentation", "step"  # programs that run in each step

CPU = "cpu"
"""Name of the topology of this machine's CPU, whose speed and memory are not published."""


@dataclass(frozen=True)
class StagePlanCost:
    """Cost of a stage on each chip, as it is compiled for the recipe's batch size.

    Where that batch does not fit into the chip's memory, everything is for the largest batch that
    does.

    Attributes:
      program: the stage.
      trained: number of parameters that train.
      programs: cost of one call of each compiled program: `step`, `augmentation` (on the device),
        `gradient_norms`, `validation` (from images or features), and `features of BLOCK` for the
        parts of the frozen prefix. Empty if no batch fits.
      kept: bytes that stay beside the programs': the state at the best epoch.
      chip: the published numbers of the chips; None for a CPU.
      wanted: the stage's batch size in the recipe.
    """

    program: StageProgram
    trained: int
    programs: Mapping[str, HloCost]
    kept: int
    chip: Chip | None
    wanted: int

    @property
    def batch_size(self) -> int:
        """Largest batch up to the recipe's that fits into the memory; 0: none."""
        return self.program.settings.batch_size if self.programs else 0

    @property
    def fits(self) -> bool:
        """Whether the recipe's batch size fits into the memory of the chips."""
        return self.batch_size == self.wanted

    @property
    def memory(self) -> int:
        """Bytes that the stage needs: its largest program, and the state at the best epoch."""
        return self.kept + max((cost.memory for cost in self.programs.values()), default=0)

    @property
    def features(self) -> tuple[HloCost, ...]:
        """Costs of the parts of the frozen prefix, whose features are cached."""
        return tuple(cost for name, cost in self.programs.items() if name.startswith("features"))

    @property
    def flops(self) -> float:
        """Operations of a step, or for a linear probe of the features of a batch."""
        return sum(cost.flops for cost in self._repeated)

    @property
    def bytes_accessed(self) -> float:
        """Bytes that a step moves, or for a linear probe the features of a batch."""
        return sum(cost.bytes_accessed for cost in self._repeated)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Estimated time of a step, from the chip's peak and bandwidth; None if they are unknown.

        The lower end lets computation and memory traffic overlap, the upper end adds them. Neither
        includes communication or the input of images.
        """
        if not (self.chip and self.programs):
            return None
        model, recipe = self.program.model, self.program.recipe
        compute = self.flops / self.chip.peak(model.options.get("dtype"), recipe.matmul_precision)
        traffic = self.bytes_accessed / self.chip.bandwidth
        return max(compute, traffic), compute + traffic

    @property
    def images_per_second(self) -> tuple[float, float] | None:
        """Images of a step by its time, on all chips."""
        if not self.seconds:
            return None
        low, high = (self.batch_size / seconds for seconds in reversed(self.seconds))
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers as plain values."""
        program, prefix = self.program, self.program.prefix
        return {
            "stage": program.plan.stage.name,
            "epochs": program.epochs,
            "steps": program.steps,
            "trained_parameters": self.trained,
            "wanted_batch_size": self.wanted,
            "batch_size": self.batch_size,
            "fits": self.fits,
            "memory": self.memory,
            "kept": self.kept,
            "flops": self.flops,
            "bytes_accessed": self.bytes_accessed,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "programs": {name: dataclasses.asdict(cost) for name, cost in self.programs.items()},
            "frozen_prefix": {
                "blocks": prefix.blocks,
                "cached_for_training": prefix.train,
                "cached_for_validation": prefix.val,
                "mib": prefix.mib,
                "reason": prefix.reason,
            },
        }

    @property
    def _repeated(self) -> tuple[HloCost, ...]:
        steps = tuple(self.programs[name] for name in _EACH_STEP if name in self.programs)
        return steps or self.features


@dataclass(frozen=True)
class RunPlan:
    """A recipe bound to devices and to a number of images.

    Attributes:
      recipe: the recipe.
      model: its network.
      shapes: parameters and statistics of the network.
      splits: stand for the images; nobody reads them.
      devices: where the run would run.
      chip: the published numbers of the devices; None for a CPU.
      evaluations: cost of the evaluation from images by loss and batch size, once compiled.
    """

    recipe: Recipe
    model: Model
    shapes: tuple[Tree, Tree]
    splits: Splits
    devices: Devices
    chip: Chip | None
    evaluations: dict[object, HloCost] = field(default_factory=dict, compare=False)

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, topology: str, *, train_images: int, val_images: int, classes: int
    ) -> "RunPlan":
        """Binds a recipe to a topology by name, `cpu` or see `Topology.parse`.

        Raises:
          JaxftError: the recipe is wrong, or there is no such topology.
        """
        recipe = resolve(recipe)
        open_recipe.check_network(recipe, None)
        open_recipe.check_augment(recipe)
        splits = Splits(_images(train_images, classes), _images(val_images, classes))
        model = open_recipe.open_network(recipe, None, splits.train.classes)
        expected = expected_preprocessing(without_lora(model), None)
        recipe = dataclasses.replace(recipe, image_size=recipe.image_size or expected.image_size)
        open_recipe.check_image_size(recipe, model)
        if topology == CPU:
            devices, chip = Devices(recipe.sharding).with_cache(recipe.device_cache_mib), None
        else:
            slices = _slices(topology)
            devices, chip = slices.devices(recipe.sharding), slices.chip
            cache_mib = recipe.device_cache_mib
            devices = devices.with_cache(cache_share(chip.hbm) if cache_mib is None else cache_mib)
        return cls(recipe, model, init_shapes(model), splits, devices, chip)

    def programs(self, batch_size: int | None = None) -> tuple[StageProgram, ...]:
        """Returns the programs of the stages, for another batch size in all of them if given.

        Raises:
          JaxftError: a stage does not fit the network, the images or the batch size.
        """
        recipe = self.recipe
        if batch_size is not None:
            stages = tuple(dataclasses.replace(each, batch_size=None) for each in recipe.stages)
            recipe = dataclasses.replace(recipe, batch_size=batch_size, stages=stages)
        return build_programs(recipe, self.model, self.splits, self.devices, self.shapes)


def stage_cost(plan: RunPlan, index: int) -> StagePlanCost:
    """Returns the cost of a stage, which it compiles: once, or several times to fit the memory."""
    programs = plan.programs()
    wanted = programs[index].settings.batch_size
    cost = _compiled_cost(plan, programs, index, wanted)
    if cost is not None:
        return cost
    # Other sizes would leave devices idle, or parts of a batch unequal.
    counts = [len(plan.devices) * stage.accumulate for stage in plan.recipe.stages]
    unit = math.lcm(*counts)

    def attempt(units: int) -> StagePlanCost | Literal[False] | None:
        try:
            smaller = plan.programs(units * unit)
        except RecipeError:  # a batch may be too small, such as a single image to mix
            return False
        return _compiled_cost(plan, smaller, index, wanted)

    _, cost = largest(attempt, -(-wanted // unit))
    return cost or _cost(plan, programs[index], wanted, {}, 0)


def largest(
    attempt: Callable[[int], T | Literal[False] | None], limit: int
) -> tuple[int, T | None]:
    """Finds the largest number below `limit` with a result, by bisection; at most 3 % too low.

    Args:
      attempt: returns False for numbers that are too small, then results up to the wanted number,
        and None above it.
      limit: a number without a result.

    Returns:
      The number and its result; `(0, None)` if none has a result.

    Example:
      >>> largest(lambda n: f"{n} fit" if n <= 5 else None, limit=64)
      (5, '5 fit')
    """
    low = 0
    best: tuple[int, T | None] = (0, None)
    while limit - low > max(1, low // 32):
        middle = (low + limit) // 2
        result = attempt(middle)
        if result is None:
            limit = middle
            continue
        low = middle
        if result is not False:
            best = middle, result
    return best


def _compiled_cost(
    plan: RunPlan, programs: tuple[StageProgram, ...], index: int, wanted: int
) -> StagePlanCost | None:
    """Compiles a stage; returns its cost, or None if it does not fit into the memory."""
    program, state = programs[index], opt_state_shapes(programs, index, plan.shapes[0])
    snapshot = Snapshot(*plan.shapes, state)
    try:
        compiled = compile_stage(program, snapshot)
        named = _named(compiled, program)
        costs = {name: hlo_cost(each) for name, each in named.items() if each is not None}
        if not compiled.score:
            costs["validation"] = _evaluation_cost(plan, program, snapshot)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    kept = _bytes_per_device(plan.devices, program.state(snapshot)[0])
    cost = _cost(plan, program, wanted, costs, kept)
    return None if plan.chip and cost.memory > plan.chip.usable else cost


def _evaluation_cost(plan: RunPlan, program: StageProgram, shapes: Snapshot) -> HloCost:
    """Compiles the evaluation from images, once for all stages with the same loss."""
    key = program.loss.function, program.recipe.batch_size
    if key not in plan.evaluations:
        compiled = compile_image_evaluation(program, shapes, len(plan.splits.val))
        plan.evaluations[key] = hlo_cost(compiled)
    return plan.evaluations[key]


def _cost(
    plan: RunPlan, program: StageProgram, wanted: int, costs: Mapping[str, HloCost], kept: int
) -> StagePlanCost:
    trainable, _ = partition(plan.shapes[0], program.plan.labels)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    return StagePlanCost(program, trained, costs, kept, plan.chip, wanted)


def _named(compiled: CompiledStage, program: StageProgram) -> dict[str, Any]:
    return {
        "step": compiled.step,
        "gradient_norms": compiled.gradient_norms,
        **{f"features of {block}": each for block, each in compiled.prefix.items()},
        "validation": compiled.score,
        "augmentation": compile_augmentation(program),
    }


def _bytes_per_device(devices: Devices, tree: Tree) -> int:
    leaves = jax.tree.leaves(devices.abstract(tree))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def _slices(topology: str) -> Topology:
    try:
        return Topology.parse(topology)
    except ParallelError as error:
        raise ParallelError(f"{error} A plan can also be for {CPU!r}, this machine's.") from error


def _images(count: int, classes: int) -> ArraySource:
    """Returns images that take no memory, with as many of each class as of any other."""
    names = tuple(str(index) for index in range(classes))
    pixels = np.broadcast_to(np.uint8(0), (count, 1, 1, 3))
    return ArraySource(names, pixels, np.arange(count, dtype=np.int32) % classes)
