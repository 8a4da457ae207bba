"""`jaxft plan`: its tables, its JSON, and one clear error for what is wrong."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from commands import call

from jaxft import Adam, LinearProbe, Recipe, Stage
from jaxft.recipe_file import fields, save
from jaxft.topology import CHIPS

RECIPE = Recipe(
    model="cifar_resnet8", data="folder:nowhere", image_size=8, batch_size=6, augment="none",
    optimizer=Adam(),
    stages=(
        Stage("probe", {"fc": LinearProbe()}),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3),
    ),
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    save(RECIPE, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_plan_prints_tables_and_writes_json(config, tmp_path):
    images = ("--train-images", 1_200, "--val-images", 4, "--classes", 5)
    out = tmp_path / "new folder" / "plan.json"
    done = call("plan", config, "--topology", "cpu", *images, "--batch-size", 4, "--json", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    plan = json.loads(out.read_text())
    probe, late = plan.pop("stages")
    assert plan == {
        "topology": "cpu",
        "devices": 1,
        "chip": None,
        "recipe": fields(RECIPE) | {"batch_size": 4},
        "train_images": 1_200,
        "val_images": 4,
        "classes": 5,
    }
    assert (probe["stage"], late["stage"], late["steps"]) == ("probe", "late", 900)
    assert late["memory"] == late["kept"] + max(x["memory"] for x in late["programs"].values())
    numbers = re.sub(r"[\d.]+ ([MG]FLOP|[KM]iB)", "#", done.stdout)
    assert numbers == (
        "cifar_resnet8, 74,965 parameters, float32\n"
        "1,200 images of 8 pixels to train on, 4 to validate, 5 classes\n"
        "on cpu: 1 device\n"
        "\n"
        "Stage 1 of 2: probe, a logistic regression on the features before its head\n"
        "Features of stem to layer3 are cached, #.\n"
        "\n"
        "  trains       325 of 74,965 parameters, 0.434%\n"
        "  batch        4 images\n"
        "  compute      # and # of memory traffic a batch on each device\n"
        "  memory       # a device (# for the best epoch)\n"
        "\n"
        "Stage 2 of 2: late, 3 epochs of 300 steps\n"
        "Features of stem to layer2 are cached, #.\n"
        "\n"
        "  trains       55,877 of 74,965 parameters, 74.5%\n"
        "  batch        4 images\n"
        "  compute      # and # of memory traffic a step on each device\n"
        "  cached       # a batch on each device, not repeated in later epochs\n"
        "  memory       # a device (# for the best epoch)\n"
        "  collectives  none\n"
    )


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--topology", "gpu"], 1, "ParallelError: 'gpu' is no topology.*'cpu'"),
        (["--topology", "v5e-7"], 1, "ParallelError: there is no slice 'v5e-7'; there are v5e-1"),
        (["--topology", "cpu", "--classes", "0"], 2, "--classes: '0' is no number from 1 on"),
        (["--topology", "cpu", "--val-images", "x"], 2, "--val-images: 'x' is no number"),
        (["--topology", "cpu", "--bacth-size", "3"], 2, "--batch-size"),
        (["--topology", "cpu", "--model", "resnet"], 1, "RecipeError: no model is called 'resnet'"),
        ([], 2, "--topology"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plan_reports_bad_options(config, options, code, message):
    done = call("plan", config, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_plan_of_unknown_recipe():
    done = call("plan", "nowhere.py", "--topology", "cpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("RecipeError: nowhere.py: no such recipe.")


def run_plan(config, out, topology):
    """Runs in another process: libtpu aborts at the flags of XLA that the tests set."""
    stage = Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=1, norms="eval")
    recipe = Recipe(
        model="cifar_resnet8", data="folder:nowhere", image_size=32, batch_size=64,
        dtype="bfloat16", cache_mib=0, device_cache_mib=0, stages=(stage,),
    )  # fmt: skip
    save(recipe, config)
    command = [sys.executable, "-m", "jaxft", "plan", config, "--topology", topology, "--json", out]
    quiet = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  batch        64 images, 16 a device\n" in done.stdout
    assert "  memory       fits: " in done.stdout
    plan = json.loads(out.read_text())
    (late,) = plan["stages"]
    assert list(late["programs"]) == ["step", "validation"]  # no features are cached
    assert 0 < late["memory"] < plan["chip"]["usable"]
    assert 0 < late["seconds"][0] <= late["seconds"][1]
    return plan, late


# Each gradient travels once, those of convolutions in bfloat16, and so do six metrics.
KERNELS = 9 * 32 * 64 + 9 * 64 * 64


@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.slow
def test_plan_for_tpu_slice(config, tmp_path):
    plan, late = run_plan(config, tmp_path / "plan.json", "v5e-4")
    assert (plan["devices"], plan["chip"]["hbm"]) == (4, CHIPS["v5e"].hbm)
    step = late["programs"]["step"]
    # No gradient passes through the frozen prefix, stem to layer2, nor into its output: one
    # product for the first convolution of layer3, and two for the second and for the head.
    assert step["convolutions"] == {"forward": 1 + 3 * 2 + 1, "backward": 1 + 2 + 2}
    assert step["operands"]["bf16 x bf16"] == (1 + 3 * 2) + (1 + 2)  # all convolutions
    assert sum(step["operands"].values()) == sum(step["convolutions"].values())
    # The whole state is donated: 8 arrays that train and their momenta, two counts of each group,
    # and the statistics of 7 norm layers.
    assert step["aliases"] == 8 + 8 + 2 * 2 + 2 * 7
    assert step["collectives"] == {"all-reduce": 5}
    others = late["trained_parameters"] - KERNELS
    assert step["collective_bytes"] == {"all-reduce": 2 * KERNELS + 4 * others + 4 * 6}


@pytest.mark.skipif(
    not find_spec("jax_cuda13_plugin"), reason="jax's plugin for CUDA is not installed"
)
@pytest.mark.slow
def test_plan_for_gpus(config, tmp_path):
    plan, late = run_plan(config, tmp_path / "plan.json", "h100-4")
    assert (plan["devices"], plan["chip"]["hbm"]) == (4, CHIPS["h100"].hbm)
    step = late["programs"]["step"]
    assert step["convolutions"] == {"forward": 1 + 3 * 2 + 1, "backward": 1 + 2 + 2}
    assert step["layouts"] == {"b01f_o01i->b01f": 7 + 3}  # all but the head's
    others = late["trained_parameters"] - KERNELS
    assert step["collective_bytes"] == {"all-reduce": 2 * KERNELS + 4 * others + 4 * 6}
    assert late["flops"] == step["flops"] > 0
