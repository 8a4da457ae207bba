"""Lists the recipes that come with jaxft, or copies one to edit.

    jaxft recipes
    jaxft recipes NAME [FILE]

The copy is FILE, by default NAME.py in the current folder. An existing file is not overwritten.
"""

import ast
import textwrap
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

from jaxft.cli.command_setup import command_parser, run_until_signal
from jaxft.cli.process import show
from jaxft.errors import RecipeError, suggestion


def run(arguments: Sequence[str], program: str = "jaxft recipes") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_recipes, arguments, program))


def recipe_files() -> dict[str, Path]:
    """Returns the recipes that come with jaxft, by name."""
    packaged = Path(str(files("jaxft"))) / "configs"
    folder = packaged if packaged.is_dir() else packaged.parents[1] / "configs"  # a checkout
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def _recipes(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft recipes", program)
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("file", metavar="FILE", nargs="?")
    known = parser.parse_args(arguments)
    recipes = recipe_files()
    if known.name is None:
        _list(recipes)
        return
    if known.name not in recipes:
        hint = suggestion(known.name, recipes)
        raise RecipeError(f"no recipe is called {known.name!r}.{hint} `{program}` lists them.")
    target = Path(known.file or f"{known.name}.py")
    try:
        with target.open("x") as file:
            file.write(recipes[known.name].read_text())
    except FileExistsError:
        raise RecipeError(f"{target} exists; name another FILE.") from None
    print(f"{target} is a copy of {known.name}. Train with: jaxft finetune {target} --workdir DIR")


def _list(recipes: dict[str, Path]) -> None:
    """Prints each recipe's name and the first sentence of its docstring."""
    width, lines = max(map(len, recipes)), []
    for name, path in recipes.items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        summary, indent = docstring.partition("\n")[0], " " * (width + 2)
        lines.append(
            textwrap.fill(summary, 80, initial_indent=f"{name:{width}}  ", subsequent_indent=indent)
        )
    show("\n".join([*lines, "", "jaxft recipes NAME copies one into the current folder."]))
