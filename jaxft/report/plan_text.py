"""Text of a planned run: the cost of each stage, in tables of at most 80 columns."""

import textwrap
from collections.abc import Iterator

import jax

from jaxft.hlo_cost import HloCost
from jaxft.plan_cost import RunPlan, StagePlanCost
from jaxft.report.stage_text import flop_text
from jaxft.topology import Chip

_INDENT = 15  # columns before the text of a row


def heading(plan: RunPlan, topology: str) -> str:
    """Returns the lines before the stages: network, images and devices."""
    recipe, chip = plan.recipe, plan.chip
    train, val = plan.splits
    dtype = plan.model.options.get("dtype")
    devices = f"{len(plan.devices)} device{'s' * (len(plan.devices) > 1)}"
    if chip:
        precision = recipe.matmul_precision
        devices = (
            f"{devices} of {_bytes(chip.hbm)}, {chip.peak(dtype, precision) / 1e12:.4g} TFLOP/s in "
            f"{dtype or 'float32'}, {chip.bandwidth / 1e9:g} GB/s"
        )
    lines = [
        f"{recipe.model}, {_parameters(plan):,} parameters" + (f", {dtype}" if dtype else ""),
        f"{len(train):,} images of {recipe.preprocessing.image_size} pixels to train on, "
        f"{len(val):,} to validate, {len(train.classes)} classes",
        f"on {topology}: {devices}",
    ]
    if recipe.weights and not recipe.image_size:
        lines.append("Weights are not read; if they expect another image size, add --image-size.")
    return "\n".join(lines)


def rows(plan: RunPlan, cost: StagePlanCost) -> Iterator[str]:
    """Yields the table of a stage."""
    for name, text in _cells(plan, cost):
        for line in textwrap.wrap(text, 80 - _INDENT):
            yield f"  {name:{_INDENT - 4}}  {line}"
            name = ""


def closing(chip: Chip) -> str:
    """Returns the meaning of the estimated times and of the memory."""
    text = (
        f"Times are estimates from the published numbers of {chip.name}: from the longer one of "
        "computation and memory traffic to their sum. Communication between the chips, the start "
        f"of each step and the input of images come on top. Programs can use {_bytes(chip.usable)} "
        "of a device's memory."
    )
    if chip.gpu:
        text += (
            " Without a GPU, XLA takes the default algorithms of cuDNN and cuBLAS: their working "
            "memory comes on top, and the programs of a run may differ."
        )
    return text


def _cells(plan: RunPlan, cost: StagePlanCost) -> Iterator[tuple[str, str]]:
    total = _parameters(plan)
    yield "trains", f"{cost.trained:,} of {total:,} parameters, {100 * cost.trained / total:.3g}%"
    yield "batch", _batch(plan, cost)
    if not cost.programs:
        return
    work = "batch" if cost.program.plan.stage.linear_probe else "step"
    traffic = f"{_bytes(cost.bytes_accessed)} of memory traffic"
    yield "compute", f"{flop_text(cost.flops)} and {traffic} a {work} on each device"
    if cost.program.prefix.train and work == "step":
        flops = sum(each.flops for each in cost.features)
        yield "cached", f"{flop_text(flops)} a batch on each device, not repeated in later epochs"
    if cost.seconds and cost.images_per_second:
        time = f"{_range(*(1e3 * seconds for seconds in cost.seconds))} ms a {work}"
        yield "time", f"{time}, {_range(*cost.images_per_second)} images/s"
    yield "memory", _memory(cost)
    if step := cost.programs.get("step"):
        yield "collectives", _collectives(step)


def _batch(plan: RunPlan, cost: StagePlanCost) -> str:
    count = len(plan.devices)
    if cost.fits:
        return f"{cost.wanted:,} images" + f", {cost.wanted / count:g} a device" * (count > 1)
    text = f"{cost.wanted:,} images do not fit"
    if not cost.batch_size:
        return f"{text}, and no smaller batch that the stage can train with does"
    return f"{text}; {cost.batch_size:,} do, and all below is for these"


def _memory(cost: StagePlanCost) -> str:
    text = f"{_bytes(cost.memory)} a device"
    if cost.chip:
        text += f", {100 * cost.memory / cost.chip.usable:.3g}%"
    fits = "fits: " if cost.chip and cost.fits else ""
    return f"{fits}{text} ({_bytes(cost.kept)} for the best epoch)"


def _collectives(step: HloCost) -> str:
    sizes = step.collective_bytes
    kinds = [f"{n} {kind}, {_bytes(sizes[kind])}" for kind, n in sorted(step.collectives.items())]
    return "; ".join(kinds) or "none"


def _parameters(plan: RunPlan) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(plan.shapes[0]))


def _bytes(count: float) -> str:
    unit, size = next(
        (each for each in (("GiB", 2**30), ("MiB", 2**20)) if count >= each[1]), ("KiB", 2**10)
    )
    return f"{float(f'{count / size:.3g}'):,g} {unit}"


def _range(low: float, high: float) -> str:
    """Returns a range with two significant digits, or one number if its ends round to the same."""
    ends = [float(f"{number:.2g}") for number in (low, high)]
    texts = [f"{number:,.0f}" if number >= 10 else f"{number:g}" for number in ends]
    return " to ".join(dict.fromkeys(texts))
