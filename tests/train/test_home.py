"""`~` at the start of a path is the user's home wherever a path comes in."""

import dataclasses

import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET
from PIL import Image

from jaxft import Recipe, Stage, finetune, models, recipe_file


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@pytest.mark.slow
def test_home_is_expanded_in_each_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            pixels = np.zeros((8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / name / "0.png")
    first, second = (Stage(name, {"head": 1e-3}, epochs=1) for name in ("one", "two"))
    config = Recipe(model="net", data="folder:~/images", image_size=8, stages=(first,))
    recipe_file.save(config, "~/config.yaml")
    model = models.Linen(Net(), shape=(8, 8, 3), head="head")
    finetune(recipe_file.read("~/config.yaml"), "~/run", model=model, console=QUIET)
    finetune(
        dataclasses.replace(config, weights="~/run", head="keep"),
        "~/again",
        model=model,
        console=QUIET,
    )
    two = dataclasses.replace(config, stages=(first, second))
    finetune(two, "~/fork", fork_from="~/run", model=model, console=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again", "config.yaml", "fork", "images", "run",
    ]  # fmt: skip
