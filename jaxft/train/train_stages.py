"""Trains the stages of a run one after another; compiles each while the one before it trains."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import jax

from jaxft.checkpoint.contents import Snapshot
from jaxft.example_function import function_name
from jaxft.open_recipe import Start
from jaxft.report.stage_text import cost, epilogue, gap, spared, title
from jaxft.train.compiled_stage import CompiledStage, compile_stage
from jaxft.train.feature_cache import StageFeatures
from jaxft.train.fork import Fork, read_fork, save_first_checkpoint, stage_index
from jaxft.train.gradient_stage import run_gradient_stage
from jaxft.train.linear_probe_stage import run_linear_probe_stage
from jaxft.train.metrics import Score
from jaxft.train.resume import resume
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import (
    Progress,
    StageState,
    item_shapes,
    next_opt_state,
    opt_state_shapes,
    with_stage_merge,
)
from jaxft.train.trainer import Trainer

T = TypeVar("T")

_POLL_SECONDS = 0.2  # between two looks at whether the run must stop


class InBackground(Generic[T]):
    """Runs a function in a background thread.

    XLA compiles without the GIL, so training in the meantime loses only the cores that it takes.

    Attributes:
      seconds: duration of the function.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.seconds = 0.0
        self._error: BaseException | None = None
        x64 = bool(jax.numpy.zeros(0, float).dtype == "float64")  # of the calling thread

        def work() -> None:
            started = time.perf_counter()
            try:
                with jax.enable_x64(x64):
                    self._result = function()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - started

        # No daemon: at the end of Python the compiler would abort.
        self._thread = threading.Thread(target=work, name="jaxft-compile")
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the function has not ended yet."""
        return self._thread.is_alive()

    def result(self, glance: Callable[[], None] = lambda: None) -> T:
        """Waits for the function; returns its result or raises its error.

        While it waits it calls `glance`, which may raise.
        """
        while self.is_running:
            glance()
            self._thread.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
        return self._result


def train_stages(trainer: Trainer, start: Start, forked: Fork | None) -> tuple[Progress, Snapshot]:
    """Trains the stages from the run's current state to the end of the last stage.

    Args:
      trainer: the run's trainer.
      start: parameters and statistics that the run starts from; shapes if it has begun.
      forked: end of another run's stage to start from.

    Returns:
      The progress and the arrays at the end of the last stage.

    Raises:
      JaxftError: see `resume`, `run_gradient_stage` and `run_linear_probe_stage`.
    """
    shapes = jax.eval_shape(lambda: start)
    resumed = resume(trainer, *shapes)
    if resumed:
        index = resumed[0].stage + bool(resumed[0].ended)
    else:
        index = stage_index(forked, trainer.recipe) + 1 if forked else 0
    for program in trainer.programs[index:]:  # better now than after hours
        trainer.checkpoints.check_room(item_shapes(trainer.programs, program.index, *shapes))
    if index < len(trainer.programs):
        ahead = _compile(trainer, index, shapes)
        trainer.console.say(f"Compiling stage {trainer.programs[index].plan.stage.name!r} ...")
        with trainer.programs[index].fitting_memory():
            progress, arrays = resumed or _begin(trainer, index, start, forked, ahead)
    elif resumed:
        progress, arrays = resumed
    validated = 0.0
    while index < len(trainer.programs):
        program = trainer.programs[index]
        if validated and ahead.is_running:  # after the first stage
            trainer.console.say(f"Compiling stage {program.plan.stage.name!r} ...")
        with program.fitting_memory():
            compiled = _compiled(trainer, ahead)
            current = (
                arrays
                if isinstance(arrays, StageState)
                else _enter(trainer, program, compiled, progress, arrays)
            )
            seconds = ahead.seconds
            text = f"{cost(program, compiled, seconds)}\n{spared(program)}"
            _announce(trainer, program, text, current)
            if not program.prefix.on_devices:
                trainer.device_cache.clear()  # this stage needs the memory
            if index + 1 < len(trainer.programs):
                ahead = _compile(trainer, index + 1, shapes)
            run_stage = (
                run_linear_probe_stage if program.plan.stage.linear_probe else run_gradient_stage
            )
            arrays = run_stage(trainer, program, compiled, current)
        progress = current.progress
        trainer.console.row("")
        after = trainer.programs[index + 1 : index + 2]
        keep = any(program.plan.stage.carry == "keep" for program in after)
        trainer.console.say(epilogue(program.plan, progress, keep=keep))
        if validated:
            trainer.console.say(gap(current.began - validated, seconds))
        validated, index = current.validated, index + 1
    assert isinstance(arrays, Snapshot)  # the last stage has ended
    return progress, arrays


def _begin(
    trainer: Trainer,
    index: int,
    start: Start,
    forked: Fork | None,
    ahead: InBackground[CompiledStage],
) -> tuple[Progress, Snapshot]:
    """Evaluates the start of the run, which begins with stage `index`.

    Raises:
      NonFiniteError: the score is not finite.
      InterruptedRunError: a signal came.
    """
    if forked:
        at = read_fork(trainer, forked, *jax.eval_shape(lambda: start))
    else:
        at = Snapshot(*trainer.devices.put(start), None)
    features = None
    if trainer.programs[index].prefix.val:  # what is made of the images now is kept
        features = trainer.features(trainer.programs[index], _compiled(trainer, ahead), lambda: at)
    score = _score_at_start(trainer, trainer.programs[index], at, features)
    if forked:
        return save_first_checkpoint(trainer, forked, score, at), at
    return Progress.at_start(0, 0, score), at


def _score_at_start(
    trainer: Trainer, program: StageProgram, at: Snapshot, features: StageFeatures | None
) -> Score:
    """Evaluates the start of a stage; raises what `_begin` raises."""
    with trainer.clock.measure("validation"):
        score = trainer.evaluate(program, at.params, at.stats, features)
    if score is None:
        raise trainer.stopped()
    place = f"stage {program.plan.stage.name!r}, before the first step"
    trainer.check_validation(at.params, at.stats, score, place=place)
    return score


def _compile(trainer: Trainer, index: int, shapes: Start) -> InBackground[CompiledStage]:
    """Starts to compile a stage in the background."""

    def compiled() -> CompiledStage:
        state = opt_state_shapes(trainer.programs, index, shapes[0])
        return compile_stage(trainer.programs[index], Snapshot(*shapes, state))

    return InBackground(compiled)


def _compiled(trainer: Trainer, ahead: InBackground[CompiledStage]) -> CompiledStage:
    """Waits for a stage that compiles in the background."""
    with trainer.clock.measure("compile"):
        return ahead.result(partial(_glance, trainer))


def _enter(
    trainer: Trainer, program: StageProgram, compiled: CompiledStage, before: Progress, at: Snapshot
) -> StageState:
    """Returns a stage's start from the end of the stage before, or from the start of the run."""
    at = with_stage_merge(program, at)
    state, progress = compiled.fresh(at.params), before
    if program.index:
        state, remarks = next_opt_state(program, at.opt_state, state)
        for remark in remarks:
            trainer.console.say(remark)
        previous = trainer.programs[before.stage]
        score = before.restored_score(previous.plan.stage)
        if program.loss.function != previous.loss.function:  # its losses cannot be compared
            features = trainer.features(program, compiled, lambda: at)
            score = _score_at_start(trainer, program, at, features)
        progress = Progress.at_start(program.index, before.step, score)
    return StageState.at_start(program, progress, at._replace(opt_state=state))


def _announce(trainer: Trainer, program: StageProgram, cost: str, current: StageState) -> None:
    plan, progress, params = program.plan, current.progress, current.best.params
    for remark in plan.remarks:
        trainer.console.say(f"Stage {plan.stage.name!r}: {remark}")
    heading, metrics = title(program, len(trainer.programs)), trainer.recipe.metrics
    names = [function_name(metric) for metric in metrics]
    trainer.console.stage(plan, heading, cost, params, program.norms, metrics=names)
    if progress.epoch == progress.position == 0:
        trainer.console.epoch_row(0, None, progress.score, None)


def _glance(trainer: Trainer) -> None:
    """Stops to wait when a signal came; several processes agree on that later."""
    if jax.process_count() == 1 and trainer.stop_asked():
        raise trainer.stopped()
