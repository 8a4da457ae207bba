"""Console text of a stage: its length and cost, and how it ended."""

from jaxft.stage_plan import StagePlan
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress


def title(program: StageProgram, of: int) -> str:
    """Returns the title of a stage, with its number `of` how many and its length."""
    stage, steps = program.plan.stage, program.steps
    most = "at most " if stage.until or stage.max_minutes else ""
    if stage.linear_probe:
        length = "a logistic regression on the features before its head"
    elif steps == stage.steps:
        length = f"{most}{steps} steps, {program.steps_per_epoch} an epoch"
    else:
        epochs, steps = program.epochs, program.steps_per_epoch
        length = f"{most}{epochs} epoch{'s' * (epochs > 1)} of {steps} step{'s' * (steps > 1)}"
    return f"Stage {program.index + 1} of {of}: {stage.name}, {length}"


def gap(seconds: float, compiled: float) -> str:
    """Returns a sentence on the time before a stage's first step; both arguments are in seconds."""
    return (
        f"Its first step followed {seconds:.2f} s after the last validation; compilation took "
        f"{compiled:.2f} s."
    )


def cost(program: StageProgram, compiled: CompiledStage, seconds: float) -> str:
    """Returns the cost of a step, or for a linear probe of the features of a batch.

    `seconds` is the compile time.
    """
    if program.plan.stage.linear_probe:
        cost = f"{flop_text(compiled.prefix_flops)} a batch"
    else:
        cost = f"{flop_text(compiled.flops)} a step"
        if dtype := program.model.options.get("dtype"):
            cost += f" in {dtype}"
        if program.prefix.train:
            cost += f" ({flop_text(compiled.prefix_flops)} cached)"
    return f"{cost}, compiled in {seconds:.1f} s"


def flop_text(count: float) -> str:
    """Returns a number of operations with its unit."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def spared(program: StageProgram) -> str:
    """Returns a sentence on the cached blocks, and why training images are not cached."""
    prefix = program.prefix
    if not prefix.blocks:
        return f"No features are cached: {prefix.reason}."
    first, last = prefix.blocks[0], prefix.blocks[-1]
    size = _mib(prefix.mib)
    if prefix.on_devices:
        where = " in device memory"
        if (count := len(program.devices)) > 1:
            size += f", {_mib(prefix.mib / count)} a device"
    else:
        where = " on disk" if program.recipe.disk_cache_mib else ""
    blocks = first if first == last else f"{first} to {last}"
    if prefix.train:
        return f"Features of {blocks} are cached{where}, {size}."
    text = f"Features of {blocks} are not cached for training: {prefix.reason}."
    if prefix.val:
        text += f" For validation they are cached{where}, {size}."
    return text


def _mib(size: float) -> str:
    return f"{float(f'{size:.3g}'):,g} MiB"  # three digits without an exponent


def epilogue(plan: StagePlan, progress: Progress, *, keep: bool = False) -> str:
    """Returns why the stage ended, and which epoch the next stage starts from.

    `keep`: whether the next stage keeps the optimizer state.
    """
    sentence = f"Stage {plan.stage.name!r} ended: {progress.ended}. "
    averaged = ""
    if progress.averaged:
        averaged = f" Averaged with its start, accuracy {progress.averaged.accuracy:.4f}."
    if plan.stage.restore == "last":
        return (
            sentence + f"Its last epoch is kept (accuracy {progress.score.accuracy:.4f}).{averaged}"
        )
    monitor, _ = plan.stage.best_by
    values = [f"{name} {progress.best.values[name]:.4f}" for name in (monitor, "accuracy")]
    values = list(dict.fromkeys(values))
    if progress.best_epoch == 0:
        sentence += f"No epoch improved on the {monitor} of its start, which is kept"
    else:
        sentence += f"Epoch {progress.best_epoch} was its best by {monitor} and is kept"
    sentence += f" ({', '.join(values)}).{averaged}"
    if keep and progress.best_epoch < progress.epoch:
        then = f"after epoch {progress.best_epoch}" if progress.best_epoch else "at its start"
        sentence += f" The optimizer state {then} is kept with it (carry='keep')."
    return sentence
