"""Compares recorded steps and reports the first difference, or that there is none."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np

from jaxft.parity.step import Arrays, Step

PARTS = tuple(field.name for field in fields(Step))
_CAUSES = {
    "lr": "which parameters train, their learning rates, and when the scheduler steps: epoch "
    "(or step) t uses the scheduler's value at t",
    "outputs": "the forward pass of that block: padding, strides, eps, and the statistics that its "
    "norm layers use (`norms` of the stage, train() and eval() in PyTorch)",
    "loss": "the loss function: mean or sum, label smoothing, class weights",
    "stats": "the update of the running statistics: the layers that it includes, its momentum of "
    "0.1, and the unbiased variance in running_var",
    "grads": "the differentiated function: a penalty, or a detached part",
    "moments": "the optimizer's update of its moments: momentum, betas, clipping, and whether "
    "weight decay is added to the gradient first",
    "params": "the optimizer's update of the parameters: eps inside or outside the root, bias "
    "correction, nesterov, decoupled weight decay",
}
_CARRIED = (
    "the optimizer state at the start of this stage: carry='keep' keeps the state of the stage "
    "before, as add_param_group does; carry='reset' starts a new optimizer"
)


@dataclass(frozen=True)
class Difference:
    """An array that differs between PyTorch and jaxft.

    Attributes:
      name: torch's name of a parameter or statistic, or the name of a block.
      size: largest difference, relative to the largest value of the array; infinite if only one
        side has the array.
      torch: PyTorch's value where the difference is largest.
      ours: jaxft's value where the difference is largest.
    """

    name: str
    size: float
    torch: float
    ours: float


@dataclass(frozen=True)
class Report:
    """The result of `compare`; `print` it for a summary.

    Attributes:
      stages: names of the stages.
      steps: number of compared steps per stage.
      largest: largest difference per stage and part of a step (see `jaxft.parity.step.Step`).
      part: the first part that differs in the last compared step; None if all steps agree.
      differences: the arrays of that part that differ, in the network's order.
      rtol: tolerance of the comparison.
      dtype: compute dtype of both sides.
    """

    stages: tuple[str, ...]
    steps: tuple[int, ...]
    largest: Mapping[str, Mapping[str, float]]
    part: str | None
    differences: tuple[Difference, ...]
    rtol: float
    dtype: str

    @property
    def agree(self) -> bool:
        """Whether no difference exceeds `rtol`."""
        return self.part is None

    @property
    def stage(self) -> str:
        """Name of the last compared stage."""
        return self.stages[len(self.steps) - 1]

    @property
    def step(self) -> int:
        """Number of the last compared step in its stage, from 1."""
        return self.steps[-1]

    def __str__(self) -> str:
        summary = self._first_difference() if self.part else self._agreement()
        return "\n".join([*summary, *self._table()])

    def _agreement(self) -> list[str]:
        steps = f"all {sum(self.steps)} steps"
        return [f"PyTorch and jaxft agree to {self.rtol:g} in {self.dtype}, in {steps}."]

    def _first_difference(self) -> list[str]:
        assert self.part
        number, count = len(self.steps), len(self.stages)
        earlier_parts = PARTS[: PARTS.index(self.part)]
        is_stage_start = self.step == 1 and number > 1
        is_carried = is_stage_start and self.part in ("moments", "params")
        lines = [
            f"PyTorch and jaxft differ in stage {self.stage!r} ({number} of {count}), step "
            f"{self.step}, first in {self.part}:"
        ]
        lines += [
            f"  {difference.name}: PyTorch {difference.torch:.7g}, jaxft {difference.ours:.7g} "
            f"(relative {difference.size:.0e})"
            for difference in self.differences[:5]
        ]
        if len(self.differences) > 5:
            lines.append(f"  and {len(self.differences) - 5} more")
        if earlier_parts:
            lines.append(textwrap.fill(f"In this step, {', '.join(earlier_parts)} agree.", 80))
        cause = _CARRIED if is_carried else _CAUSES[self.part]
        return [*lines, textwrap.fill(f"Check {cause}.", 80)]

    def _table(self) -> list[str]:
        width = min(18, max(5, *map(len, self.stages)))
        rows = [f"{'stage':{width}}{'steps':>6}" + "".join(f"{part:>8}" for part in PARTS)]
        for stage, steps in zip(self.stages, self.steps, strict=False):
            cells = "".join(f"{self.largest[stage][part]:8.0e}" for part in PARTS)
            rows.append(f"{stage[:width]:{width}}{steps:6}{cells}")
        return ["", "Largest differences, relative to the largest value of each array:", *rows]


def differences(torch: Arrays, ours: Arrays, floor: float = 1e-6) -> list[Difference]:
    """Returns the difference of each array.

    Args:
      torch: PyTorch's arrays by name.
      ours: jaxft's arrays by name.
      floor: smallest scale of an array, relative to the largest value of all arrays. Without it,
        rounding errors in arrays of zeros would count as large differences.
    """
    scales = {name: float(np.abs(x).max(initial=0.0)) for name, x in torch.items()}
    smallest_scale = floor * max(scales.values(), default=0.0) or 1.0
    result = []
    for name in dict.fromkeys((*torch, *ours)):
        if name not in ours or name not in torch or torch[name].shape != ours[name].shape:
            result.append(Difference(name, math.inf, *_largest_values(name, torch, ours)))
            continue
        gap = np.abs(torch[name] - ours[name])
        gap = np.where(np.isnan(gap), math.inf, gap)
        worst = np.unravel_index(gap.argmax(), gap.shape)
        size = float(gap[worst]) / max(scales[name], smallest_scale)
        result.append(Difference(name, size, float(torch[name][worst]), float(ours[name][worst])))
    return result


def _largest_values(name: str, torch: Arrays, ours: Arrays) -> Sequence[float]:
    """Returns the largest value of an array on each side, NaN if the side does not have it."""
    return [
        float(np.max(side[name], initial=-math.inf)) if name in side else np.nan
        for side in (torch, ours)
    ]


def compare_steps(
    torch: Iterable[Step],
    ours: Iterable[Step],
    *,
    stages: Sequence[str],
    lengths: Sequence[int],
    rtol: float,
    dtype: str,
) -> Report:
    """Compares the steps of two trainings and stops at the first step that differs.

    Args:
      torch: PyTorch's steps.
      ours: jaxft's steps.
      stages: names of the stages.
      lengths: number of steps of each stage.
      rtol: tolerance, relative to the largest value of each array.
      dtype: compute dtype, for the report.
    """
    pairs = zip(torch, ours, strict=True)
    largest: dict[str, dict[str, float]] = {}
    steps: list[int] = []
    for stage, length in zip(stages, lengths, strict=True):
        largest[stage] = dict.fromkeys(PARTS, 0.0)
        steps.append(0)
        for torch_step, our_step in islice(pairs, length):
            steps[-1] += 1
            for part in PARTS:
                part_differences = differences(getattr(torch_step, part), getattr(our_step, part))
                worst = max((difference.size for difference in part_differences), default=0.0)
                largest[stage][part] = max(largest[stage][part], worst)
                if worst > rtol:
                    exceeding = tuple(d for d in part_differences if d.size > rtol)
                    return Report(
                        tuple(stages), tuple(steps), largest, part, exceeding, rtol, dtype
                    )
    return Report(tuple(stages), tuple(steps), largest, None, (), rtol, dtype)
