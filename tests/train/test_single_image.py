"""A norm layer with one value per channel is refused before training, as in torch."""

import dataclasses

import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET

from jaxft import Recipe, RecipeError, Stage, data, finetune
from jaxft.models import Linen


class Pooled(nn.Module):
    """Applies a norm layer to a map of one pixel, or with `pools=False` to all pixels."""

    pools: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.mean((1, 2), keepdims=True) if self.pools else x
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


pytestmark = pytest.mark.usefixtures("stage_ends_only")

RECIPE = Recipe(
    model="own",
    data="noise",
    batch_size=4,
    image_size=8,
    resize_size=8,
    augment="none",
    stages=(Stage("all", {"*": 1e-2}, epochs=1, restore="last"),),
)
NOISE = data.arrays(
    np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8), np.arange(5) % 2, ("a", "b")
)


def run(workdir, pools=True, stage=None, **changes):
    stages = tuple(dataclasses.replace(each, **stage or {}) for each in RECIPE.stages)
    recipe = dataclasses.replace(RECIPE, stages=stages, **changes)
    model = Linen(Pooled(pools), shape=(8, 8, 3), head="head")
    finetune(recipe, workdir, data=data.Splits(NOISE, NOISE), model=model, console=QUIET)


@pytest.mark.parametrize(
    ("changes", "stage"),
    [({}, {}), ({"batch_size": 1}, {}), ({"drop_last": True}, {"accumulate": 4})],
    ids=["last batch", "every batch", "parts"],
)
def test_single_image_on_a_map_of_one_pixel_is_refused(changes, stage, tmp_path):
    told = r"stage 'all': .* single image, on which batch statistics of bn need .*drop_last=True"
    with pytest.raises(RecipeError, match=told):
        run(tmp_path / "run", stage=stage, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pools", "changes", "stage"),
    [
        (True, {"drop_last": True}, {}),
        (True, {}, {"norms": "eval"}),
        (True, {}, {"epochs": None, "steps": 1}),
        (False, {}, {}),
    ],
    ids=["drop_last", "running statistics", "never reached", "larger map"],
)
def test_single_image_is_accepted_where_torch_accepts_it(pools, changes, stage, tmp_path):
    run(tmp_path / "run", pools, stage, **changes)
