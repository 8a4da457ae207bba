"""Stage follows stage: each hands on its arrays, and the next one's programs are ready by then."""

from functools import partial

import jax

from jaxft.train import fork
from jaxft.train.compilation import Ahead
from jaxft.train.fork import Fork
from jaxft.train.kept import Inputs
from jaxft.train.memory import fitting_memory
from jaxft.train.nonfinite import check_validation
from jaxft.train.norms import mode_names
from jaxft.train.position import Position, at_start
from jaxft.train.program import Compiled, Program, Snapshot
from jaxft.train.progress import Progress
from jaxft.train.record import cost, epilogue, gap, spared, title
from jaxft.train.resume import next_state, resume, state_shapes, structure
from jaxft.train.run import Run
from jaxft.train.stage import train_stage
from jaxft.train.start import Start


def train_stages(run: Run, start: Start, forked: Fork | None) -> tuple[Progress, Snapshot]:
    """Goes through the stages from where the run is; returns the end of the last.

    Raises as `train_stage` and `resume` do.
    """
    shapes = jax.eval_shape(lambda: start)
    found = resume(run, *shapes)
    if found:
        index = found[0].stage + bool(found[0].ended)
    else:
        index = fork.check(forked, run.recipe) + 1 if forked else 0
    for program in run.programs[index:]:  # better now than after hours
        run.checkpoints.check_room(structure(run.programs, program.index, *shapes))
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
            position = (
                at if isinstance(at, Position) else _enter(run, program, compiled, progress, at)
            )
            seconds = ahead.seconds
            told = f"{cost(program, compiled, seconds)}\n{spared(program)}"
            _announce(run, program, told, position)
            if index + 1 < len(run.programs):
                ahead = _compile(run, index + 1, shapes)
            at = train_stage(run, program, compiled, position)
        progress = position.progress
        run.console.row("")
        after = run.programs[index + 1 : index + 2]
        keep = any(program.plan.stage.carry == "keep" for program in after)
        run.console.say(epilogue(program.plan, progress, keep=keep))
        if validated:
            run.console.say(gap(position.began - validated, seconds))
        validated, index = position.validated, index + 1
    assert isinstance(at, Snapshot)  # the last stage has ended
    return progress, at


def _begin(
    run: Run, index: int, start: Start, forked: Fork | None, ahead: Ahead[Compiled]
) -> tuple[Progress, Snapshot]:
    """Returns the run's start, which is that of stage `index`, with its score on the run's images.

    Raises NonFiniteError for a score that is not finite, InterruptedRunError if a signal has come.
    """
    if forked:
        at = fork.take(run, forked, *jax.eval_shape(lambda: start))
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
        return fork.begin(run, forked, score, at), at
    return Progress.at_start(0, 0, score), at


def _compile(run: Run, index: int, shapes: Start) -> Ahead[Compiled]:
    """Begins to compile a stage, in the background."""

    def compiled() -> Compiled:
        state = state_shapes(run.programs, index, shapes[0])
        return run.programs[index].compile(Snapshot(*shapes, state))

    return Ahead(compiled)


def _enter(
    run: Run, program: Program, compiled: Compiled, before: Progress, at: Snapshot
) -> Position:
    """A stage's start, from what the one before has handed on; of the first, the run's."""
    state, progress = compiled.fresh(at.params), before
    if program.index:
        state, remarks = next_state(program, at.opt_state, state)
        for remark in remarks:
            run.console.say(remark)
        score = before.handed_on(run.programs[before.stage].plan.stage)
        progress = Progress.at_start(program.index, before.step, score)
    return at_start(program, progress, at._replace(opt_state=state))


def _announce(run: Run, program: Program, cost: str, position: Position) -> None:
    plan, progress, params = program.plan, position.progress, position.best.params
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
