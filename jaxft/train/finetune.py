"""The story of a run: opens and checks everything, trains the stages, writes the result.

A run finds its start in this order:

1. the newest checkpoint in its workdir (`jaxft.train.resume.resume`),
2. the end of another run's stage (`fork_from`, see `jaxft.train.fork`),
3. the arrays in `start`,
4. the recipe's pretrained weights,
5. random weights.
"""

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax

from jaxft import agreement, export, lost_process, models
from jaxft.array_cache import ArrayCache
from jaxft.batch_sizes import batch_sizes, oversized
from jaxft.checkpoint import atomic, weights_only
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.data import Source, Splits
from jaxft.data.validate import without_warnings
from jaxft.devices import Devices
from jaxft.distributed import check_devices, is_main_process
from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.models.nnx_adapter import init_shapes
from jaxft.open_recipe import (
    Start,
    check_augment,
    check_image_size,
    check_network,
    draw_start,
    fit_start,
    open_network,
    open_splits,
    read_weights,
    wanted_classes,
)
from jaxft.process_exchange import announced
from jaxft.progress import show_progress_on
from jaxft.recipe import Recipe
from jaxft.recipe_file import resolve
from jaxft.report import environment
from jaxft.report.console import Console
from jaxft.report.device_advice import device_advice
from jaxft.report.metrics_log import MetricsLog
from jaxft.stage_plan import untrained_frozen_remarks
from jaxft.train.end_report import write_end_report
from jaxft.train.eval_step import image_eval_step
from jaxft.train.fork import (
    Fork,
    check_fork,
    find_fork,
    stage_index,
    start_weights,
    with_head_order,
)
from jaxft.train.metrics import Score
from jaxft.train.run_caches import RunCaches
from jaxft.train.signals import Interruption, interruptible
from jaxft.train.stage_program import StageProgram, build_programs
from jaxft.train.train_stages import train_stages
from jaxft.train.trainer import Trainer
from jaxft.train.workdir import check, check_apart, check_extension, claim, saved
from jaxft.weights.description import MARK, STRIDES


@dataclass(frozen=True)
class Result:
    """Result of a run.

    Attributes:
      score: validation score of the exported weights.
      weights: safetensors file with torch's names; `model.json` lies beside it.
      checkpoint: folder of the last checkpoint.
      report: page about the run; None if it could not be written.
    """

    score: Score
    weights: Path
    checkpoint: Path
    report: Path | None = None


@without_warnings()
def finetune(
    recipe: Recipe,
    workdir: str | os.PathLike[str],
    *,
    data: Source | Splits | None = None,
    model: models.Model | None = None,
    start: Start | None = None,
    fork_from: str | os.PathLike[str] | None = None,
    stage: str | None = None,
    extend: bool = False,
    console: Console | None = None,
    on_epoch_end: Callable[[dict[str, Any]], object] | None = None,
    caches: RunCaches | None = None,
) -> Result:
    """Trains a recipe's stages in a folder, or continues the run in that folder.

    A run that is killed at any moment and called again ends bit-identically to an unbroken one.
    SIGTERM or one SIGINT makes it save a checkpoint and stop; before training they stop it at once.
    Their handlers are restored in the end.

    Args:
      recipe: network, images and stages.
      workdir: folder of the run, on a disk or in a bucket.
      data: images to use instead of the recipe's, such as `jaxft.data.arrays(...)`. `recipe.data`
        is then only their name in the output.
      model: network to use instead of the recipe's, such as `jaxft.models.Linen(...)`.
        `recipe.model` is then only its name.
      start: `(params, stats)` of the network to start from, instead of pretrained or random
        weights. They are cast to the network's dtypes. A missing head, or one of another size, is
        replaced by a new one, see `recipe.head`; with `head="zeros"` or `"xavier"` any head is.
      fork_from: workdir of another run. This one starts from the end of its stage called `stage`
        and continues with the recipe's stage after that.
      stage: name of that stage; by default the last one that has ended.
      extend: allow more epochs (or steps, max_minutes, patience) in the last stage of the run in
        `workdir`, and stages after it. The run ends as if it had been that long from the start, up
        to rounding if appended stages divide groups of parameters. A last stage that has ended
        continues from its newest checkpoint before the end. A stage that has ended by `EarlyStop`
        stays ended unless its patience grows.
      console: where to print.
      on_epoch_end: function that receives each epoch's row of `metrics.jsonl` as a dict, a copy,
        once validation is over and a checkpoint is being saved; for live plots and pruning. An
        error of it ends the run and is raised as it is; the same call resumes after that epoch. A
        resumed run calls it only for the epochs that it runs. Each process calls it, with its own
        times and memory; all must raise or none.
      caches: opened images and caches of an earlier call with the same network, images and
        preprocessing, to use again instead of `data`. The run then exports no weights and writes no
        report.

    Returns:
      The score and the paths of the exported weights, the last checkpoint and the report.

    Raises:
      JaxftError: recipe, data, weights or folder are wrong. It is raised before training starts,
        except for later events such as a full disk or an image that becomes unreadable.
      InterruptedRunError: a signal stopped the run.
      NonFiniteError: the loss has become NaN or infinite.
    """
    with (
        interruptible() as interruption,
        lost_process.translated(),
        announced(),
        ExitStack() as stack,
    ):
        if not (on_epoch_end is None or callable(on_epoch_end)):
            raise RecipeError(
                f"on_epoch_end is {on_epoch_end!r}; it must be a function of one argument, the "
                "metrics of an epoch as a dict."
            )
        recipe, folder = resolve(recipe), atomic.anywhere(workdir)
        check_devices()
        console = console or Console(quiet=not is_main_process())
        stack.enter_context(show_progress_on(console.terminal))
        if stage is not None and fork_from is None:
            raise RecipeError(
                f"stage {stage!r} is to be forked, but fork_from names no run to fork."
            )
        check_network(recipe, model)
        check_augment(recipe)

        # Find the run's start, and check the folder.
        begun, source, forked = saved(folder), None, None
        interruption.resumes = begun is not None
        if begun:
            recipe = recipe.expecting(begun.preprocessing)
        elif fork_from is not None:
            forked = find_fork(fork_from, stage)
            ended_stage = stage_index(forked, recipe)
            recipe = recipe.expecting(forked.recipe.preprocessing)
        check(folder, recipe, extend=extend)
        if data is None:
            check_apart(folder, recipe.data)

        # Open images, network, weights and devices.
        exports = caches is None  # the runs of a comparison share caches, and export nothing
        if caches is None:
            opened = RunCaches.of_recipe(recipe, open_splits(recipe, data))
            caches = stack.enter_context(closing(opened))
        splits = caches.splits
        classes = splits.train.classes
        model = open_network(recipe, model, classes)
        # A run that has begun does not need its pretrained weights, which may be out of reach.
        if not begun and not forked:
            source, recipe = read_weights(recipe, model, classes)
        check_image_size(recipe, model)
        devices = Devices(recipe.sharding).with_cache(recipe.device_cache_mib)
        origin, remarks = recipe.weights or "random weights", list[str]()
        if forked:
            origin = f"stage {forked.stage!r} of {forked.workdir}"
            forked = with_head_order(forked, recipe, model, classes)
        elif start is not None:
            origin = "the arrays given"
        is_random = not (begun or forked or source) and start is None
        if begun or forked:
            start = init_shapes(model)
        elif start is None:
            start = draw_start(recipe, model, source, wanted_classes(recipe, classes))
        else:
            start, remarks = fit_start(recipe, model, start)

        # Bind the stages to network, images and devices, and check them.
        programs = build_programs(recipe, model, splits, devices, start)
        remarks += oversized([program.sizes for program in programs], len(splits.train))
        if is_random:
            remarks += untrained_frozen_remarks([program.plan for program in programs], start[0])
        if begun and begun.stages != recipe.stages:
            shorter = dataclasses.replace(recipe, stages=begun.stages)
            old = build_programs(shorter, model, splits, devices, start)
            check_extension(folder, begun, old, programs, start)
        if forked:
            check_fork(forked, ended_stage, programs, *start)
        agreement.check_agreement(folder, recipe, splits, devices.cache_mib)

        # Print what is about to run, then train.
        console.row(_prologue(recipe, splits, start[0], origin))
        remarks += environment.idle_accelerator()
        remarks += device_advice(model, [program.sizes for program in programs], devices)
        of_start = [each.remarks for each in (source, forked) if each]
        for remark in (*splits.remarks, *chain(*of_start), *remarks):
            console.say(remark)
        interruption.wait()
        with claim(folder, recipe, extend=extend):
            return _run(
                programs, caches, start, forked, recipe, folder, console, interruption,
                on_epoch_end, exports=exports,
            )  # fmt: skip


def _run(
    programs: tuple[StageProgram, ...],
    caches: RunCaches,
    start: Start,
    forked: Fork | None,
    recipe: Recipe,
    workdir: Path,
    console: Console,
    interruption: Interruption,
    on_epoch_end: Callable[[dict[str, Any]], object] | None,
    *,
    exports: bool,
) -> Result:
    """Trains the stages of opened programs in a folder; exports the weights and a report."""
    devices, model, splits = programs[0].devices, programs[0].model, caches.splits
    with (
        closing(Checkpoints(workdir / "checkpoints")) as checkpoints,
        closing(MetricsLog(workdir, writes=is_main_process())) as metrics,
    ):
        if is_main_process():
            environment.append(workdir)
        anchor_params = None
        has_anchor = any(program.plan.stage.anchor for program in programs)
        needs_start = has_anchor or programs[0].plan.stage.finish
        if needs_start and checkpoints.latest_step() is None:
            pretrained = start_weights(forked, model) if forked else start
            # A run that died before its first checkpoint may have left another recipe's.
            weights_only.save_weights(workdir / "start", *devices.put(pretrained), replace=True)
        if has_anchor:
            anchor_params = devices.put(weights_only.read_weights(workdir / "start")[0])
        sizes = batch_sizes(model, devices, len(splits.val), recipe.batch_size)
        evaluators = {
            loss: image_eval_step(recipe, model, sizes, loss)
            for loss in dict.fromkeys(program.loss.function for program in programs)
        }
        device_cache = ArrayCache(devices.cache_mib * len(devices) * 2**20)
        trainer = Trainer(
            recipe, splits, programs, devices, evaluators, checkpoints, metrics, console,
            interruption, anchor_params, caches.features, device_cache, caches.batches,
            on_epoch_end,
        )  # fmt: skip
        progress, end = train_stages(trainer, start, forked)
        if trainer.stop_asked():
            raise trainer.stopped()
        score = progress.restored_score(programs[-1].plan.stage)
        trees = devices.host((end.params, end.stats))
        exported, report = workdir / "model.safetensors", None
        if exports and is_main_process():
            classes = splits.train.classes
            export.write(
                workdir, recipe, model, *trees, classes=classes, score=score,
                pixels=programs[0].pixels, multi_label=programs[0].loss.multi_label,
            )  # fmt: skip
            if model.options.get(MARK):
                console.say(f"\n{STRIDES}")
            report = write_end_report(workdir, trainer, progress, *trees)
    return Result(score, exported, workdir / "checkpoints" / str(progress.step), report)


def _prologue(recipe: Recipe, splits: Splits, params: Tree, origin: str) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    devices = jax.devices()
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{recipe.model}, {count:,} parameters, from {origin}\n"
        f"{recipe.data}: {len(splits.train):,} images to train on, {len(splits.val):,} to "
        f"validate, {len(splits.train.classes)} classes\n"
        f"on {len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}{processes}"
    )
