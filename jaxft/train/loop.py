"""A whole run: everything is opened and checked, then stage follows stage, then hand back."""

import dataclasses
import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from jaxft import data, models, weights
from jaxft.carryover import carry_with_remarks
from jaxft.checkpoint import Checkpoints
from jaxft.data import Cached, Preprocessing, Source, Splits
from jaxft.data.arrays import Arrays
from jaxft.errors import CheckpointError
from jaxft.groups import StagePlan, plan
from jaxft.labels import Tree
from jaxft.recipe import Recipe, resolve
from jaxft.report.console import Console
from jaxft.report.metrics import MetricsLog
from jaxft.train import export
from jaxft.train.evaluate import Score, eval_step
from jaxft.train.progress import Progress
from jaxft.train.stage import Run, Snapshot, train_stage
from jaxft.train.workdir import check, claim, saved
from jaxft.weights.head import new_head


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      score: by validation, of the weights handed back.
      weights: the torch-named safetensors file; `model.json` lies beside it.
      checkpoint: the last checkpoint's folder.
      from_scratch: the score of the same network from random weights, if the recipe asks.
    """

    score: Score
    weights: Path
    checkpoint: Path
    from_scratch: Score | None = None


def finetune(
    recipe: Recipe,
    workdir: str | os.PathLike[str],
    *,
    data: Source | Splits | None = None,
    console: Console | None = None,
) -> Result:
    """Runs a recipe in a folder of its own, or goes on with the run that the folder holds.

    A run killed at any moment and called again ends bit-identically to one that was not.

    data: images to use instead of those that the recipe names, such as `jaxft.data.arrays(...)`;
      `recipe.data` is then no more than their name, in what is printed and saved.

    Raises:
      JaxftError: anything wrong with recipe, data, weights or folder, before training starts;
        later only what could not be known (an image that has become unreadable, a full disk).
    """
    recipe, workdir, console = resolve(recipe), Path(workdir), console or Console()
    recipe.network(num_classes=1)  # its name and options, before anything takes time
    begun, source = saved(workdir), None
    if begun:
        recipe = recipe.expecting(begun.preprocessing)
    check(workdir, recipe)
    splits = _open(recipe, data)
    # A run that has begun needs its pretrained weights no more: they may be gone, or out of reach.
    if not begun:
        source = weights.read(recipe.weights) if recipe.weights else None
        recipe = recipe.expecting((source and source.preprocessing) or Preprocessing())
    scratch = dataclasses.replace(
        recipe,
        weights=None,
        head="fresh",
        stages=recipe.from_scratch or recipe.stages,
        from_scratch=(),
    )
    check(workdir / "from_scratch", scratch)
    model = recipe.network(len(splits.train.classes))
    start = _start(recipe, model, source, workdir)
    plans = plan(recipe.stages, start[0])
    if recipe.from_scratch:
        plan(recipe.from_scratch, start[0])  # its patterns must not fail after hours of the others
    console.row(_prologue(recipe, splits, start[0]))
    for remark in (*splits.remarks, *(source.remarks if source else ())):
        console.say(remark)
    result = _run(recipe, model, splits, plans, start, workdir, console)
    if recipe.from_scratch:
        console.row("\nFor comparison, the same network from random weights:")
        folder = workdir / "from_scratch"
        start = _start(scratch, model, None, folder)
        plans = plan(scratch.stages, start[0])
        console.row(_prologue(scratch, splits, start[0]))
        other = _run(scratch, model, splits, plans, start, folder, console)
        result = dataclasses.replace(result, from_scratch=other.score)
    return result


def _open(recipe: Recipe, given: Source | Splits | None) -> Splits:
    """The recipe's images, those given or those it names; decoded ones are kept as they fit."""
    splits = data.open_source(
        recipe.data if given is None else given,
        train=recipe.train_split,
        val=recipe.val_split,
        shots=recipe.shots,
        seed=recipe.seed,
        on_bad_image=recipe.on_bad_image,
    )
    # Whether drop_last leaves anything must be known before there is a folder.
    data.steps_per_epoch(splits.train, recipe.batch_size, drop_last=recipe.drop_last)
    count = sum(map(len, splits))

    def kept(source: Source) -> Source:
        if isinstance(source, Arrays):  # is in memory
            return source
        return Cached(source, recipe.cache_mib * 2**20 * len(source) // count)

    return Splits(kept(splits.train), kept(splits.val), splits.remarks)


def _run(
    recipe: Recipe,
    model: models.Model,
    splits: Splits,
    plans: tuple[StagePlan, ...],
    start: tuple[Tree, Tree],
    workdir: Path,
    console: Console,
) -> Result:
    with claim(workdir, recipe), closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step()
        with closing(MetricsLog(workdir, step=step or 0)) as metrics:
            evaluator = eval_step(model, recipe.preprocessing, tta=recipe.tta)
            run = Run(recipe, model, splits, plans, evaluator, checkpoints, metrics, console)
            if step is None:
                progress = Progress.at_start(0, 0, run.evaluate(*start))
                current = best = Snapshot(*start, _fresh(run, 0, start[0]))
            else:
                progress, current, best = _resume(run, step, *start)
            progress, current = _train_stages(run, progress, current, best)
        handed_on = progress.handed_on(plans[-1].stage)
        exported = export.write(
            workdir,
            recipe,
            model,
            current.params,
            current.stats,
            classes=splits.train.classes,
            score=handed_on,
        )
    return Result(handed_on, exported, checkpoints.path(progress.step))


def _start(
    recipe: Recipe, model: models.Model, source: weights.Weights | None, workdir: Path
) -> tuple[Tree, Tree]:
    """What the run starts from; of one that has begun, the shapes."""
    key = jax.random.key(recipe.seed)
    if saved(workdir):
        return jax.eval_shape(model.init, key)
    if source:
        return weights.load(source, model, head=recipe.head, key=key)
    params, stats = model.init(key)
    if recipe.head in ("zeros", "xavier"):
        params[model.head] = new_head(model, recipe.head, key)
    return params, stats


def _train_stages(
    run: Run, progress: Progress, current: Snapshot, best: Snapshot
) -> tuple[Progress, Snapshot]:
    while True:
        if not progress.ended:
            progress, current = train_stage(run, progress, current, best)
        following = progress.stage + 1
        if following == len(run.plans):
            return progress, current
        stage = run.plans[progress.stage].stage
        progress = Progress.at_start(following, progress.step, progress.handed_on(stage))
        opt_state, remarks = _next_state(run, following, current.opt_state, current.params)
        for remark in remarks:
            run.console.say(remark)
        current = best = current._replace(opt_state=opt_state)


def _resume(run: Run, step: int, params: Tree, stats: Tree) -> tuple[Progress, Snapshot, Snapshot]:
    """The arrays of a checkpoint, in the structure of the stage that wrote it."""
    fields = run.checkpoints.progress(step)
    if (before := fields.pop("data")) != run.data:
        raise CheckpointError(
            f"the images have changed since {run.checkpoints.path(step)} was written:\n  "
            f"{before} then,\n  {run.data} now.\nBring them back, or choose another --workdir."
        )
    progress = Progress.from_fields(fields)
    stage = run.plans[progress.stage].stage
    run.console.say(
        f"Going on from step {step}: stage {stage.name!r}, "
        f"{'ended' if progress.ended else 'after'} epoch {progress.epoch} of {stage.epochs}."
    )
    opt_state = jax.eval_shape(partial(_state_at, run, progress.stage), params)
    like = Snapshot(params, stats, opt_state)._asdict()
    if not progress.ended:
        like["best"] = dict(like)
    arrays = run.checkpoints.restore(step, like)
    best = Snapshot(**arrays.pop("best")) if "best" in arrays else Snapshot(**arrays)
    return progress, Snapshot(**arrays), best


def _fresh(run: Run, stage: int, params: Tree) -> Tree:
    return run.transform(stage).init(params)


def _next_state(run: Run, stage: int, state: Tree, params: Tree) -> tuple[Tree, list[str]]:
    """The optimizer's state at a stage's start, given that at the end of the one before."""
    plan, fresh = run.plans[stage], _fresh(run, stage, params)
    if plan.stage.carry == "reset":
        return fresh, []
    return carry_with_remarks(state, fresh, park=plan.park)


def _state_at(run: Run, stage: int, params: Tree) -> Tree:
    """A state of a stage's structure, with what is parked: as if all stages before had run."""
    state = _fresh(run, 0, params)
    for k in range(1, stage + 1):
        state, _ = _next_state(run, k, state, params)
    return state


def _prologue(recipe: Recipe, splits: Splits, params: Tree) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    devices = jax.devices()
    return (
        f"{recipe.model}, {count:,} parameters, from {recipe.weights or 'random weights'}\n"
        f"{recipe.data}: {len(splits.train):,} images to train on, {len(splits.val):,} to "
        f"validate, {len(splits.train.classes)} classes\n"
        f"on {len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    )
