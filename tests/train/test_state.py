"""The best epoch in a checkpoint: only the arrays that the stage changes."""

import jax
import numpy as np
import pytest

from jaxft import Recipe, Stage, data, models
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.devices import Devices
from jaxft.labels import paths
from jaxft.train.metrics import EpochMetrics, Score
from jaxft.train.stage_program import build_programs
from jaxft.train.state import Progress, StageState, header_of, item_shapes

MODEL = models.create("cifar_resnet8", num_classes=5)
START = MODEL.init(jax.random.key(0))


def stage(stage):
    recipe = Recipe(model=MODEL.name, data="digits:5-9", batch_size=4, stages=(stage,))
    images = data.arrays(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), classes=list("abcde"))
    return build_programs(recipe, MODEL, Splits(images, images), Devices(), START)[0]


@pytest.mark.parametrize(
    ("trains", "norms", "params", "stats"),
    [
        ({"fc": 0.1}, "frozen_eval", "fc", ()),
        ({"fc": 0.1}, "batch", "fc", ""),
        ({"fc": 0.1, "layer3": 0.1}, "frozen_eval", ("fc", "layer3"), "layer3"),
        ({"fc": 0.1, "layer3": 0.1}, "eval", ("fc", "layer3"), ()),
        ({"*": 0.1}, "frozen_eval", "", ""),
    ],
    ids=["head", "statistics move", "late", "no statistics move", "all"],
)
def test_best_epoch_shares_unchanged_arrays(trains, norms, params, stats):
    program = stage(Stage("only", trains, 1, norms=norms))
    now = Snapshot(*START, program.transform().init(START[0]))
    worse = Score(1.0, 0.0, 0.0)
    best = StageState.at_start(program, Progress.at_start(0, 0, worse), now)
    arrays = best.items(program)
    for name, tree, moving in zip(("params", "stats"), START, (params, stats), strict=True):
        written = arrays["best"][name]
        assert paths(written) == [path for path in paths(tree) if path.startswith(moving)]
    shapes = jax.eval_shape(lambda: arrays)
    assert item_shapes((program,), 0, *jax.eval_shape(lambda: START)) == shapes

    # Steps move what they change; the best stays what it was.
    for name in ("params", "stats"):
        arrays[name] = jax.tree.map(
            lambda best, x: x if best is None else x + 1,
            arrays["best"][name],
            arrays[name],
            is_leaf=lambda x: x is None,
        )
    header = header_of(best.progress, EpochMetrics(), data={}, recipe={}, rows=())
    again = StageState.restored(program, header, arrays)
    jax.tree.map(np.testing.assert_array_equal, again.best, now)
    assert not np.array_equal(again.shown.params["fc"]["bias"], now.params["fc"]["bias"])
