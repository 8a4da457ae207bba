"""`jaxft recipes` and `jaxft doctor`."""

import re
from pathlib import Path

from commands import call

from jaxft.recipe_file import read

ROOT = Path(__file__).parents[2]


def test_recipes_lists_every_config():
    done = call("recipes")
    table, hint = done.stdout.rstrip().split("\n\n")
    names = [line.split()[0] for line in table.splitlines() if line[0] != " "]
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert re.search("^quickstart +Trains a small ResNet, pretrained", done.stdout, re.M)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert hint == "jaxft recipes NAME copies one into the current folder."


def test_recipes_copies_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("recipes", "quickstart")
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "quickstart.py") == read(ROOT / "configs/quickstart.py")
    again = call("recipes", "quickstart")
    assert (again.returncode, again.stderr) == (
        1,
        "RecipeError: quickstart.py exists; name another FILE.\n",
    )
    assert call("recipes", "quickstart", "mine.py").returncode == 0
    wrong = call("recipes", "quickstar")
    assert "no recipe is called 'quickstar'. Did you mean 'quickstart'?" in wrong.stderr


def test_doctor_reports_the_installation():
    done = call("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^jaxft \S+ in ", done.stdout)
    assert re.search(r"devices +\d+ cpu", done.stdout)
    assert re.search(r"gcs +(installed|missing: pip install 'jaxft\[gcs\]')", done.stdout)
