"""A run's folder: whose it is, and that one run at a time works in it."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxft import recipe_file as recipes
from jaxft.checkpoint import layout
from jaxft.checkpoint.atomic import in_bucket
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.data.folder import class_roots
from jaxft.distributed import ask_main_process
from jaxft.errors import CheckpointError, JaxftError, RecipeError
from jaxft.labels import Tree
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.recipe import Recipe
from jaxft.recipe_differences import differences, listed, refused
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress, opt_state_shapes


def saved(workdir: str | PathLike[str]) -> Recipe | None:
    """Returns the recipe of the run in the folder, None before its first checkpoint.

    The newest checkpoint holds it, with a checksum; `recipe.yaml` is a copy that may be damaged.
    """
    found = _newest(workdir)
    return found and found[0]


def read_run(workdir: str | PathLike[str]) -> tuple[Recipe, Header]:
    """Returns the recipe of a run and the header of its newest checkpoint.

    Raises:
      CheckpointError: the folder holds no run with a checkpoint.
    """
    found = _newest(workdir)
    if found is None:
        raise CheckpointError(f"{workdir} holds no run with a checkpoint; name a run's --workdir.")
    return found


def _newest(workdir: str | PathLike[str]) -> tuple[Recipe, Header] | None:
    folder = epath.Path(workdir) / "checkpoints"
    values = layout.newest_header(folder)
    if values is None:
        return None
    header = Header.from_json(values)
    recipe = recipes.from_fields(header.recipe, source=f"the newest checkpoint in {folder}")
    return recipe.expecting(recipe.preprocessing), header


def check(workdir: str | PathLike[str], recipe: Recipe, *, extend: bool = False) -> None:
    """Checks that the folder is free, or holds a run of the same recipe.

    With `extend`, the recipe may be longer than the run's; see `refused`.

    Raises:
      RecipeError: it is not.
    """
    folder = epath.Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; --workdir must name a folder.")
    before = saved(folder)
    if before and (changed := differences(before, recipe)):
        wrong = refused(before, recipe)
        if extend and wrong:
            raise RecipeError(
                f"{folder} holds a run of another recipe:\n  {listed(wrong)}\n"
                "--extend takes a longer last stage, and further stages after it, alone. Choose "
                "another --workdir; --fork-from takes over the stages that stay."
            )
        if not extend:
            way = "choose another --workdir, or delete this one to start over."
            raise RecipeError(
                f"{folder} holds a run of another recipe:\n  {listed(changed)}\n"
                + (way.capitalize() if wrong else f"Go on with it for longer by --extend, or {way}")
            )
    elif before and _is_longer(folder / "recipe.yaml", before):
        raise RecipeError(
            f"{folder} is to go on for longer: {folder / 'recipe.yaml'} has more epochs or stages "
            "than its last checkpoint. Go on with that recipe by --extend, or delete the file to "
            "end the run as it was planned before."
        )
    if not before and (weights := folder / "model.safetensors").exists():
        raise RecipeError(
            f"{weights} is of a run whose checkpoints are gone, and this run would replace it. "
            "Choose another --workdir, or move it away to start over."
        )
    # Without a checkpoint there is nothing else to lose.
    if before or (folder / "recipe.yaml").exists():
        return
    if folder.is_dir() and any(_visible(folder)):
        raise RecipeError(f"{folder} is not empty and holds no run; choose another --workdir.")


def _is_longer(file: epath.Path, before: Recipe) -> bool:
    """Returns whether the file is a recipe that extends the run, and that no checkpoint has yet."""
    try:
        recipe = recipes.read(file)
        recipe = recipe.expecting(recipe.preprocessing)
    except (OSError, JaxftError):  # damaged
        return False
    return bool(differences(before, recipe)) and not refused(before, recipe)


def check_extension(
    workdir: str | PathLike[str],
    before: Recipe,
    old: Sequence[StageProgram],
    new: Sequence[StageProgram],
    start: tuple[Tree, Tree],
) -> None:
    """Checks that the run can end as if it had been longer from the start.

    Args:
      workdir: the run's folder.
      before: its recipe so far.
      old: the programs of that recipe's stages.
      new: the programs of the longer recipe's stages.
      start: parameters and statistics, or their shapes.

    Raises:
      RecipeError: it cannot.
    """
    index = len(old) - 1
    with closing(Checkpoints(epath.Path(workdir) / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return
        progress = Progress.from_fields(Header.from_json(checkpoints.header(step)).progress)
    for begun in range(min(progress.stage, index) + 1):
        _check_lrs(old[begun], new[begun])
    if progress.stage < index:
        return  # nothing of the last stage has been trained
    if old[index].plan.stage == new[index].plan.stage and progress.ended:
        return
    was, now = (
        jax.tree.leaves_with_path(opt_state_shapes(programs, index, start[0]))
        for programs in (old, new)
    )
    if was != now:
        raise RecipeError(
            f"stage {before.stages[index].name!r} has begun, and the stages that are appended "
            "divide its groups of parameters. Let it end with its own recipe, then append them."
        )


def _check_lrs(old: StageProgram, new: StageProgram) -> None:
    """Raises RecipeError if a schedule of the stage would have been another."""
    spans = [program.plan.span(program.steps_per_epoch) for program in (old, new)]
    for group, update in new.plan.updates().items():
        schedule = update.schedule
        if isinstance(schedule, ReduceLROnPlateau):
            continue
        times = [span.time(schedule.by, jnp.arange(old.steps)) for span in spans]
        was, now = (
            [np.asarray(x) for x in (schedule.lr_at(update.lr, *time), schedule.momentum(*time))
             if x is not None]
            for time in times
        )  # fmt: skip
        if not all(map(np.array_equal, was, now)):
            raise RecipeError(
                f"stage {new.plan.stage.name!r}: the learning rates of {group!r} by "
                f"{type(schedule).__name__} depend on its length, of which "
                f"{times[0][1]} {schedule.by}s are planned and {times[1][1]} wanted: the run would "
                "not be the longer one. Append a stage instead, with its own schedule."
            )


def check_apart(workdir: str | PathLike[str], data: str) -> None:
    """Checks that the folder does not lie among the folders of the classes.

    A resumed run, or another one, would take it for a class.

    Raises:
      RecipeError: it does.
    """
    kind, _, place = data.partition(":")
    if kind != "folder" or in_bucket(workdir):
        return
    for root in class_roots(place):
        if root.resolve() in Path(workdir).resolve().parents:
            raise RecipeError(
                f"{workdir} lies in {root}, where each folder is a class of images; choose a "
                "--workdir outside of it."
            )


def _visible(folder: epath.Path) -> list[str]:
    """Returns the names in the folder, without the lock and the hidden files of a killed run."""
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name != "lock" and not name.startswith(".")]


@contextmanager
def claim(workdir: str | PathLike[str], recipe: Recipe, *, extend: bool = False) -> Iterator[None]:
    """Saves the recipe in the folder, and locks the folder for the time of the run.

    All processes of a run must call it; the first one locks the folder.

    A bucket has no lock that the end of a process would free. There only the check of the recipe
    keeps a second run out: two runs of the same recipe mix their rows and checkpoints.

    Raises:
      RecipeError: see `check`; or another run uses the folder, or it cannot be written.
    """
    folder = epath.Path(workdir)
    with ExitStack() as held:
        if objection := ask_main_process(lambda: _claimed(folder, recipe, held, extend)):
            raise RecipeError(objection)
        yield


def _claimed(folder: epath.Path, recipe: Recipe, held: ExitStack, extend: bool) -> str:
    """Claims the folder until `held` is closed; returns why not, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not in_bucket(folder):
            lock = held.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any death
        check(folder, recipe, extend=extend)
        recipes.save(recipe, folder / "recipe.yaml")
    except BlockingIOError:
        return f"another process is training in {folder}."
    except FileExistsError:
        return f"{folder} is a link that leads nowhere; choose another --workdir."
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}."
    except RecipeError as error:
        return str(error)
    return ""
