"""What the README says, done: its commands are those of the house, its examples run."""

import re
from pathlib import Path

import pytest

from jaxft.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readmes_test_command():
    lines = [line for line in README.splitlines() if "pytest" in line]
    assert len(lines) == 1  # which .ci/run looks for
    assert "grep -m 1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_library_example_trains_the_head_alone():
    names = {}
    exec(EXAMPLES[0], names)
    assert (names["params"]["body"]["kernel"] == 1).all()
    assert (names["params"]["head"]["kernel"] != 1).all()


def test_the_recipe_example_is_a_recipe():
    names = {}
    exec(EXAMPLES[1], names)
    assert isinstance(names["recipe"], Recipe)
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_open_with_their_command_and_result(path):
    docstring = path.read_text().split('"""')[1]
    assert f"    python scripts/finetune.py configs/{path.name} --workdir runs/" in docstring
    assert "Measured" in docstring
