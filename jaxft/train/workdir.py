"""A run's folder: whose it is, and that one process at a time works in it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxft import checkpoint
from jaxft import recipe as recipes
from jaxft.errors import RecipeError
from jaxft.recipe import Recipe


def saved(workdir: Path) -> Recipe | None:
    """The recipe of the run that the folder holds, if that has come as far as a checkpoint."""
    file = workdir / "recipe.yaml"
    if file.is_file() and checkpoint.exist(workdir / "checkpoints"):
        begun = recipes.read(file)
        return begun.expecting(begun.preprocessing)
    return None


def check(workdir: Path, recipe: Recipe) -> None:
    """Raises RecipeError unless the folder is free, or holds the run of this very recipe."""
    if workdir.exists() and not workdir.is_dir():
        raise RecipeError(f"{workdir} is a file; --workdir must name a folder.")
    before = saved(workdir)
    if before and (changed := recipes.differences(before, recipe)):
        raise RecipeError(
            f"{workdir} holds a run of another recipe:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --workdir, or delete this one to start over."
        )
    # Without a checkpoint there is nothing to lose.
    if not (workdir / "recipe.yaml").exists() and workdir.is_dir() and any(_visible(workdir)):
        raise RecipeError(f"{workdir} is not empty and holds no run; choose another --workdir.")


def _visible(folder: Path) -> list[str]:
    """What lies there, but for what a run leaves that is killed at birth."""
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name != "lock" and not name.startswith(".")]


@contextmanager
def claim(workdir: Path, recipe: Recipe) -> Iterator[None]:
    """Makes the folder this recipe's, and this process the only one in it, for the time of the run.

    Raises:
      RecipeError: see `check`; or another process is at work there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("w")
    except OSError as error:
        raise RecipeError(f"{workdir} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any death
        except BlockingIOError:
            raise RecipeError(f"another process is training in {workdir}.") from None
        check(workdir, recipe)
        recipes.save(recipe, workdir / "recipe.yaml")
        yield
