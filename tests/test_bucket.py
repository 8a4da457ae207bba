"""A run's folder in a bucket: all that is written there, in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import bucket
import pytest

pytestmark = pytest.mark.skipif(not find_spec("gcsfs"), reason="needs gcsfs")

RUN = """
from contextlib import closing
import jax.numpy as jnp, numpy as np
from etils import epath
from jaxft import Recipe, Stage, weights
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.recipe_file import fields
from jaxft.report import environment
from jaxft.report.metrics_log import MetricsLog
from jaxft.train.workdir import claim, saved

folder = epath.Path("gs://bucket/runs/ants")
recipe = Recipe(model="resnet18", data="digits", stages=(Stage("head", {"fc": 1e-3}, epochs=1),))
recipe = recipe.expecting(recipe.preprocessing)
whole = {"x": jnp.arange(6.0)}

def newest():
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        return checkpoints.newest(lambda progress: {"params": whole})

for step in (1, 2):
    with claim(folder, recipe), closing(MetricsLog(folder)) as log:
        log.begin([{"step": 1, "val_loss": None}] * (step - 1))
        environment.append(folder)
        log.write({"step": step, "val_loss": float("nan"), "lr": {"fc": 0.5}})
assert saved(folder) is None

with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
    assert checkpoints.newest(lambda progress: {}) is None
    for step, score, keep in ((2, 2, True), (3, 0, False), (3, 3, False)):
        header = Header({"score": score}, {}, {"classes": ["a", "b"]}, fields(recipe), ())
        checkpoints.save(step, header.to_json(), {"params": whole}, keep=keep)
assert saved(folder) == recipe
found = newest()
assert (found.step, found.header["progress"]["score"], found.remarks) == (3, 3, ())
(tensor,) = weights.read(folder, own_names=True).tensors.values()
np.testing.assert_array_equal(tensor.read(), whole["x"])
np.testing.assert_array_equal(found.arrays["params"]["x"], whole["x"])

# Killed while 3 was being replaced: there is a beginning of the new one, without its last object.
(folder / "checkpoints" / "3").rename(folder / "checkpoints" / "replaced-3")
(folder / "checkpoints" / "3" / "header" / "metadata").write_text("{}")
assert newest().header["progress"]["score"] == 3
(folder / "checkpoints" / "3" / "header" / "metadata").write_text("{}")
found = newest()
assert (found.step, len(found.remarks)) == (2, 1)
"""


@pytest.mark.slow
def test_a_folder_in_a_bucket():
    with bucket.serve() as found:
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            capture_output=True,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "STORAGE_EMULATOR_HOST": found.url,
                "TENSORSTORE_GCS_HTTP_URL": found.url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself
                "JAX_PLATFORMS": "cpu",
            },
        )
        assert done.returncode == 0, done.stderr
        objects = {
            name.removeprefix("runs/ants/"): content for name, (content, _) in found.objects.items()
        }
    kept = {name.split("/")[1] for name in objects if name.startswith("checkpoints/")}
    assert kept == {"2", "corrupt-3"}
    rows = [json.loads(row) for row in objects["metrics.jsonl"].splitlines()]
    assert [(row["step"], row["val_loss"]) for row in rows] == [(1, None), (2, None)]
    assert len(json.loads(objects["environment.json"])) == 2
    events = [content for name, content in objects.items() if name.startswith("tensorboard/")]
    assert len(events) == 2
    assert all(b"lr/fc" in content for content in events)
    others = {name for name in objects if "/" not in name}
    assert others == {"environment.json", "metrics.jsonl", "recipe.yaml"}
