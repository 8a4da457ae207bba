"""Stage follows stage: each hands on its arrays, and the next one's programs are ready by then."""

from functools import partial

import jax

from jaxft.checkpoint.contents import Snapshot
from jaxft.report.stage_text import cost, epilogue, gap, spared, title
from jaxft.train.compiled_stage import Ahead
from jaxft.train.feature_cache import Inputs
from jaxft.train.memory import fitting_memory
from jaxft.train.nonfinite import check_validation
from jaxft.train.norms import mode_names
from jaxft.train.resume import Fork, begin_fork, read_fork, resume, stage_of_fork
from jaxft.train.stage import train_stage
from jaxft.train.stage_program import Compiled, Program
from jaxft.train.start import Start
from jaxft.train.state import Progress, StageState, item_shapes, next_opt_state, opt_state_shapes
from jaxft.train.trainer import Run


def train_stages(run: Run, start: Start, forked: Fork | None) -> tuple[Progress, Snapshot]:
    """Goes through the stages from where the run is; returns the end of the last.

    Raises as `train_stage` and `resume` do.
    """
    shapes = jax.eval_shape(lambda: start)
    found = resume(run, *shapes)
    if found:
        index = found[0].stage + bool(found[0].ended)
    else:
        index = stage_of_fork(forked, run.recipe) + 1 if forked else 0
    for program in run.programs[index:]:  # better now than after hours
        run.checkpoints.check_room(item_shapes(run.programs, program.index, *shapes))
    if index < len(run.programs):
        ahead = _compile(run, index, shapes)
        run.console.say(f"Compiling stage {run.programs[index].plan.stage.name!r} ...")
        with fitting_memory(run.programs[index]):
            progress, at = found or _begin(run, index, start, forked, ahead)
    elif found:
        progress, at = found
    validated = 0.0
    while index < len(run.programs):
        program = run.programs[index]
        with fitting_memory(program):
            compiled = ahead.result(partial(_glance, run))
            current = (
                at if isinstance(at, StageState) else _enter(run, program, compiled, progress, at)
            )
            seconds = ahead.seconds
            told = f"{cost(program, compiled, seconds)}\n{spared(program)}"
            _announce(run, program, told, current)
            if index + 1 < len(run.programs):
                ahead = _compile(run, index + 1, shapes)
            at = train_stage(run, program, compiled, current)
        progress = current.progress
        run.console.row("")
        after = run.programs[index + 1 : index + 2]
        keep = any(program.plan.stage.carry == "keep" for program in after)
        run.console.say(epilogue(program.plan, progress, keep=keep))
        if validated:
            run.console.say(gap(current.began - validated, seconds))
        validated, index = current.validated, index + 1
    assert isinstance(at, Snapshot)  # the last stage has ended
    return progress, at


def _begin(
    run: Run, index: int, start: Start, forked: Fork | None, ahead: Ahead[Compiled]
) -> tuple[Progress, Snapshot]:
    """Returns the run's start, which is that of stage `index`, with its score on the run's images.

    Raises NonFiniteError for a score that is not finite, InterruptedRunError if a signal has come.
    """
    if forked:
        at = read_fork(run, forked, *jax.eval_shape(lambda: start))
    else:
        at = Snapshot(*run.devices.put(start), None)
    inputs = None
    if run.programs[index].prefix.val:  # what is made of the images now is kept
        inputs = Inputs(run, run.programs[index], ahead.result(partial(_glance, run)), lambda: at)
    score = run.evaluate(at.params, at.stats, inputs)
    if score is None:
        raise run.stopped()
    name = run.programs[index].plan.stage.name
    place = f"stage {name!r}, before the first step"
    check_validation(run, at.params, at.stats, score, place=place)
    if forked:
        return begin_fork(run, forked, score, at), at
    return Progress.at_start(0, 0, score), at


def _compile(run: Run, index: int, shapes: Start) -> Ahead[Compiled]:
    """Begins to compile a stage, in the background."""

    def compiled() -> Compiled:
        state = opt_state_shapes(run.programs, index, shapes[0])
        return run.programs[index].compile(Snapshot(*shapes, state))

    return Ahead(compiled)


def _enter(
    run: Run, program: Program, compiled: Compiled, before: Progress, at: Snapshot
) -> StageState:
    """A stage's start, from what the one before has handed on; of the first, the run's."""
    state, progress = compiled.fresh(at.params), before
    if program.index:
        state, remarks = next_opt_state(program, at.opt_state, state)
        for remark in remarks:
            run.console.say(remark)
        score = before.handed_on(run.programs[before.stage].plan.stage)
        progress = Progress.at_start(program.index, before.step, score)
    return StageState.at_start(program, progress, at._replace(opt_state=state))


def _announce(run: Run, program: Program, cost: str, current: StageState) -> None:
    plan, progress, params = program.plan, current.progress, current.best.params
    names = mode_names(params, plan.labels, program.norms)
    for remark in plan.remarks:
        run.console.say(f"Stage {plan.stage.name!r}: {remark}")
    run.console.stage(plan, title(program, len(run.programs)), cost, params, names)
    if progress.epoch == progress.position == 0:
        run.console.epoch_row(0, None, progress.score.loss, progress.score.accuracy, None)


def _glance(run: Run) -> None:
    """Ends a wait when a signal has come; several processes must agree on that, and do so later."""
    if jax.process_count() == 1 and run.stop_asked():
        raise run.stopped()
