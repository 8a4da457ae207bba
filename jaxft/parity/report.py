"""Where two trainings first differ, and by how much; or that they do not."""

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
        return "\n".join(
            [*(self._difference() if self.part else self._agreement()), *self._table()]
        )

    def _agreement(self) -> list[str]:
        count = sum(self.steps)
        return [f"PyTorch and jaxft agree to {self.rtol:g} in {self.dtype}, in all {count} steps."]

    def _difference(self) -> list[str]:
        assert self.part
        number, of = len(self.steps), len(self.stages)
        before = PARTS[: PARTS.index(self.part)]
        carried = self.part in ("moments", "params") and number > 1 and self.step == 1
        lines = [
            f"PyTorch and jaxft differ in stage {self.stage!r} ({number} of {of}), step "
            f"{self.step}, first in {self.part}:",
        ]
        for found in self.differences[:5]:
            lines.append(
                f"  {found.name}: {found.torch:.9g} in PyTorch, {found.ours:.9g} here "
                f"({found.size:.1e})"
            )
        if (more := len(self.differences) - 5) > 0:
            lines.append(f"  and {more} more")
        if before:
            lines.append(
                f"In this step, {', '.join(before)} still agree; in all before, everything."
            )
        return [*lines, f"Look at {_CARRIED if carried else _CAUSES[self.part]}."]

    def _table(self) -> list[str]:
        width = max(5, *map(len, self.stages))
        lines = [
            "",
            "Largest differences, relative to the largest value of each array:",
            "".join([f"{'stage':{width}}{'steps':>6}", *(f"{part:>9}" for part in PARTS)]),
        ]
        for stage, steps in zip(self.stages, self.steps, strict=False):
            cells = (f"{self.largest[stage].get(part, 0.0):9.1e}" for part in PARTS)
            lines.append("".join([f"{stage:{width}}{steps:6}", *cells]))
        return lines


def differences(torch: Arrays, ours: Arrays, floor: float = 1e-6) -> list[Difference]:
    """How each array differs; sizes are relative to its largest value, or `floor` of all's largest.

    The floor is for arrays that would be zero but for rounding.
    """
    scales = {name: float(np.abs(x).max(initial=0.0)) for name, x in torch.items()}
    least = floor * max(scales.values(), default=0.0) or 1.0
    found = []
    for name in dict.fromkeys((*torch, *ours)):
        if name not in ours or name not in torch or torch[name].shape != ours[name].shape:
            found.append(Difference(name, np.inf, *_one_sided(name, torch, ours)))
            continue
        gap = np.abs(torch[name] - ours[name])
        gap = np.where(np.isnan(gap), np.inf, gap)
        worst = np.unravel_index(gap.argmax(), gap.shape)
        size = float(gap[worst]) / max(scales[name], least)
        found.append(Difference(name, size, float(torch[name][worst]), float(ours[name][worst])))
    return found


def _one_sided(name: str, torch: Arrays, ours: Arrays) -> Sequence[float]:
    return [
        float(np.max(side[name], initial=-np.inf)) if name in side else np.nan
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
