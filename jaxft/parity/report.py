"""Where two trainings first differ, and by how much; or that they do not."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np

from jaxft.parity.step import Arrays, Step

PARTS = tuple(field.name for field in fields(Step))
_CAUSES = {
    "rates": "which parameters train, at which rates, and when the scheduler steps: epoch (or "
    "step) t trains with its value at t",
    "outputs": "the forward pass of that block: padding, strides, eps, and which statistics its "
    "norm layers use (the stage's `norms`, torch's train() and eval())",
    "loss": "the loss, as the logits agree: mean or sum, label smoothing, class weights",
    "stats": "how running statistics move, as the outputs agree: of which layers, by 0.1, and "
    "running_var towards the unbiased variance",
    "grads": "what is differentiated, as the loss agrees: a penalty, or a detached part",
    "moments": "what the optimizer makes of the gradients, as they agree: momentum, betas, "
    "clipping, and whether decay joins the gradient before the moments",
    "params": "what the optimizer makes of its moments, as they agree: eps in or outside the root, "
    "bias correction, nesterov, decoupled decay",
}
_CARRIED = (
    "what the optimizer brings along into this stage, as the gradients agree: with carry='keep' "
    "all that it knows, as add_param_group leaves it; with 'reset' nothing, as in a new one"
)


@dataclass(frozen=True)
class Difference:
    """One array that differs.

    Attributes:
      name: torch's, of a parameter or statistic; or a block's.
      size: the largest difference, relative to the largest value of the array; infinite where
        only one side has it.
      torch, ours: the two values where they differ most.
    """

    name: str
    size: float
    torch: float
    ours: float


@dataclass(frozen=True)
class Report:
    """What `compare` has found; its string is for reading.

    Attributes:
      stages: the names of the stages.
      steps: how many steps of each stage were compared; the last one may differ.
      largest: the largest difference of each part of a step (see `jaxft.parity.step.Step`), by
        stage.
      part: the part that differs first, in causal order; None if the two agree.
      differences: of that part, in that step, in the network's order.
      rtol: what is no difference yet.
      dtype: what both have computed in.
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
        """Whether nothing differs by more than `rtol`."""
        return self.part is None

    @property
    def stage(self) -> str:
        """The stage that was compared last."""
        return self.stages[len(self.steps) - 1]

    @property
    def step(self) -> int:
        """The step of that stage that was compared last, counted from 1."""
        return self.steps[-1]

    def __str__(self) -> str:
        found = self._first_difference() if self.part else self._agreement()
        return "\n".join([*found, *self._table()])

    def _agreement(self) -> list[str]:
        steps = f"all {sum(self.steps)} steps"
        return [f"PyTorch and jaxft agree to {self.rtol:g} in {self.dtype}, in {steps}."]

    def _first_difference(self) -> list[str]:
        assert self.part
        number, of = len(self.steps), len(self.stages)
        before = PARTS[: PARTS.index(self.part)]
        carried = self.part in ("moments", "params") and number > 1 and self.step == 1
        return [
            f"PyTorch and jaxft differ in stage {self.stage!r} ({number} of {of}), step "
            f"{self.step}, first in {self.part}:",
            *(
                f"  {found.name}: {found.torch:.7g} in PyTorch, {found.ours:.7g} here "
                f"({found.size:.0e})"
                for found in self.differences[:5]
            ),
            *([f"  and {len(self.differences) - 5} more"] if len(self.differences) > 5 else []),
            *([textwrap.fill(f"In this step, {', '.join(before)} agree.", 80)] if before else []),
            textwrap.fill(f"Look at {_CARRIED if carried else _CAUSES[self.part]}.", 80),
        ]

    def _table(self) -> list[str]:
        width = min(18, max(5, *map(len, self.stages)))
        rows = [f"{'stage':{width}}{'steps':>6}" + "".join(f"{part:>8}" for part in PARTS)]
        for stage, steps in zip(self.stages, self.steps, strict=False):
            cells = "".join(f"{self.largest[stage][part]:8.0e}" for part in PARTS)
            rows.append(f"{stage[:width]:{width}}{steps:6}{cells}")
        return ["", "Largest differences, relative to the largest value of each array:", *rows]


def differences(torch: Arrays, ours: Arrays, floor: float = 1e-6) -> list[Difference]:
    """How each array differs; sizes are relative to its largest value, or `floor` of all's largest.

    The floor is for arrays that would be zero but for rounding.
    """
    scales = {name: float(np.abs(x).max(initial=0.0)) for name, x in torch.items()}
    least = floor * max(scales.values(), default=0.0) or 1.0
    found = []
    for name in dict.fromkeys((*torch, *ours)):
        if name not in ours or name not in torch or torch[name].shape != ours[name].shape:
            found.append(Difference(name, math.inf, *_one_sided(name, torch, ours)))
            continue
        gap = np.abs(torch[name] - ours[name])
        gap = np.where(np.isnan(gap), math.inf, gap)
        worst = np.unravel_index(gap.argmax(), gap.shape)
        size = float(gap[worst]) / max(scales[name], least)
        found.append(Difference(name, size, float(torch[name][worst]), float(ours[name][worst])))
    return found


def _one_sided(name: str, torch: Arrays, ours: Arrays) -> Sequence[float]:
    return [
        float(np.max(side[name], initial=-math.inf)) if name in side else np.nan
        for side in (torch, ours)
    ]


def follow(
    torch: Iterable[Step],
    ours: Iterable[Step],
    *,
    stages: Sequence[str],
    lengths: Sequence[int],
    rtol: float,
    dtype: str,
) -> Report:
    """Compares two trainings step by step and ends with the first step that differs."""
    pairs = zip(torch, ours, strict=True)
    largest: dict[str, dict[str, float]] = {}
    steps: list[int] = []
    for stage, length in zip(stages, lengths, strict=True):
        largest[stage] = dict.fromkeys(PARTS, 0.0)
        steps.append(0)
        for one, other in islice(pairs, length):
            steps[-1] += 1
            for part in PARTS:
                found = differences(getattr(one, part), getattr(other, part))
                worst = max((difference.size for difference in found), default=0.0)
                largest[stage][part] = max(largest[stage][part], worst)
                if worst > rtol:
                    beyond = tuple(d for d in found if d.size > rtol)
                    return Report(tuple(stages), tuple(steps), largest, part, beyond, rtol, dtype)
    return Report(tuple(stages), tuple(steps), largest, None, (), rtol, dtype)
