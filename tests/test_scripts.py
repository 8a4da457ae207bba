"""The command line as a user meets it: one clear error, and nothing half-written."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jaxft import Recipe, RecipeError, models, weights
from jaxft.recipe_file import read

ROOT = Path(__file__).parents[1]


def finetune(*arguments):
    return script("finetune", *arguments)


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / f"scripts/{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
    )


def image_folder(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


def small_config(folder):
    config = folder / "config.py"
    config.write_text(
        "from jaxft import Recipe, Stage\n"
        "recipe = Recipe(model='cifar_resnet8', data='folder:nowhere', image_size=16,\n"
        "    resize_size=20, batch_size=3, stages=(Stage('all', {'*': 1e-3}, 1),))\n"
    )
    return config


def empty_class(root):
    for path in (root / "val" / "bees").iterdir():
        path.unlink()


def text_as_image(root):
    (root / "train" / "ants" / "1.jpg").write_text("no image")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stages.0.epochs", "0"], "it has 0 epochs"),
        (["--stages.0.train.fc", "-1"], "rate of 'fc' is -1.0"),
        (["--bacth-size", "3"], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--model", "cifar_resnet9"], "RecipeError: .*cifar_resnet8"),
        (["--model", "cifar_resnet20"], "WeightsError: .*"),
        (["--weights", "nowhere.safetensors"], "WeightsError: .*nowhere.safetensors"),
        (["--weights", "asset:nothing"], "WeightsError: asset:nothing: no such asset.*digits_0to4"),
        (["--data", "digits:7-11"], "DataError: "),
        (["--data", "folder:nowhere"], "DataError: .*nowhere"),
        (["--shots", "1000"], "DataError: shots=1000"),
        (["--train-split", "train[:0]"], "DataError: split 'train.:0.' is empty"),
        (["--val-split", "test"], "DataError: .*no split test"),
        (["--erasing", "2"], "erasing is 2.0; a probability lies between 0 and 1"),
        (
            ["--drop-last", "True", "--batch-size", "11"],
            "DataError: drop_last leaves nothing of 10",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(options, expected, tmp_path):
    done = finetune("configs/quickstart.py", "--workdir", tmp_path / "run", *options)
    assert done.returncode != 0
    assert re.search(expected, done.stdout + done.stderr), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "expected"),
    [(empty_class, "val/bees"), (text_as_image, "train/ants/1.jpg")],
    ids=["empty_class", "text_as_image"],
)
def test_bad_folders(damage, expected, tmp_path):
    folder = image_folder(tmp_path / "images")
    damage(folder)
    config = small_config(tmp_path)
    done = finetune(config, "--workdir", tmp_path / "run", "--data", f"folder:{folder}")
    assert done.returncode != 0
    assert done.stderr.startswith("DataError: ")
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_pattern_names_stage_and_near_misses(tmp_path):
    config = tmp_path / "config.py"
    text = (ROOT / "configs/quickstart.py").read_text()
    config.write_text(text.replace('"layer3"', '"layer5"'))
    done = finetune(config, "--workdir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.startswith("PatternError: stage 'late': pattern 'layer5' matches no param")
    assert "Did you mean 'layer3'?" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_of_images_trains_end_to_end(tmp_path):
    folder = image_folder(tmp_path / "images")
    config = small_config(tmp_path)
    done = finetune(config, "--workdir", tmp_path / "run", "--data", f"folder:{folder}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.replace(str(tmp_path), "").splitlines()
    assert [line for line in lines if len(line) > 80 or line != line.rstrip()] == []
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_help_tells_of_every_field():
    without = finetune("--help").stdout
    assert "CONFIG --workdir DIR" in without
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in without, field.name
    assert "--workdir DIR is required" in finetune("configs/quickstart.py").stderr
    done = finetune("configs/quickstart.py", "--help")
    assert done.returncode == 0
    assert "--batch-size INT" in done.stdout
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in done.stdout, field.name
    assert "--stages.1.train.layer3 FLOAT" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nrecipe = Recip()\n", r":2: NameError: name 'Recip' is not defined$"),
        ("\n\nimport nowhere\n", r":3: ModuleNotFoundError: No module named 'nowhere'$"),
        ("x = (\n", r":1: SyntaxError: '\(' was never closed$"),
        ("import json\njson.loads('')\n", r":2: JSONDecodeError: Expecting value"),
        ("recipe = 1\n", r"config.py defines no recipe"),
    ],
    ids=["name", "import", "syntax", "raised_elsewhere", "no_recipe"],
)
def test_recipe_file_error_is_one_line_with_its_place(text, message, tmp_path):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        read(tmp_path / "config.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["find_rate", "export", "convert_weights", "prepare_tfds"])
def test_output_is_checked_before_anything_else(name, tmp_path):
    """Here nothing else is there that could be read."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    arguments = {
        "find_rate": ("nowhere.py", "--out", out),
        "export": (tmp_path / "nowhere", "--out", out),
        "convert_weights": ("nowhere.safetensors", out, "--model", "resnet18"),
        "prepare_tfds": (tmp_path / "nowhere", out),
    }
    main = runpy.run_path(str(ROOT / f"scripts/{name}.py"))["main"]
    with pytest.raises(RecipeError, match="file is a file; "):
        main([*map(str, arguments[name])])


@pytest.mark.slow
def test_weights_are_converted_both_ways(tmp_path):
    """To an Orbax checkpoint in our names and back to a file in torch's: the same bytes."""
    asset = ROOT / "jaxft/assets/digits_0to4.safetensors"
    there, back = tmp_path / "jax", tmp_path / "torch.safetensors"
    for source, out in ((asset, there), (there, back)):
        done = script("convert_weights", source, out, "--model", "cifar_resnet8")
        assert done.returncode == 0, done.stderr
        assert "cifar_resnet8, 40 classes, 77,240 parameters" in done.stdout
    assert load_file(back).keys() == load_file(asset).keys()
    for name, array in load_file(asset).items():
        np.testing.assert_array_equal(load_file(back)[name], array)
    again = script("convert_weights", asset, back, "--model", "cifar_resnet8")
    assert (again.returncode, "exists" in again.stderr) == (1, True)


@pytest.mark.slow
def test_a_network_with_layers_in_its_head_is_converted(tmp_path):
    model = models.create("cifar_resnet8", num_classes=2, head_layers=(5, "relu"), binary=True)
    trees = model.init(jax.random.key(0))
    weights.save(tmp_path / "w.safetensors", model, *trees, classes=["no", "yes"])
    command = ("convert_weights", tmp_path / "w.safetensors", tmp_path / "out")
    options = ("--model", "cifar_resnet8", "--head-layers", "5", "relu")
    refused = script(*command, *options)
    assert "binary=True" in refused.stderr
    done = script(*command, *options, "--binary")
    assert done.returncode == 0, done.stderr
    assert "cifar_resnet8, 2 classes, 74,971 parameters" in done.stdout
    again = weights.read(tmp_path / "out")
    assert again.network.classes == ("no", "yes")
    jax.tree.map(np.testing.assert_array_equal, weights.load(again, model), trees)


@pytest.mark.slow
def test_a_conversion_that_does_not_fit_writes_nothing(tmp_path):
    done = script("convert_weights", "asset:digits_0to4", tmp_path / "w", "--model", "resnet18")
    assert done.returncode == 1
    assert "WeightsError: asset:digits_0to4 does not fit resnet18" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_exported(tmp_path):
    config = small_config(tmp_path)
    options = ("--data", f"folder:{image_folder(tmp_path / 'images')}")
    assert finetune(config, "--workdir", tmp_path / "run", *options).returncode == 0
    # As if the run had been killed after its checkpoint and before its end.
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("model.*")}
    for name in kept:
        (tmp_path / "run" / name).unlink()
    done = script("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    program = described.pop("program")
    assert described == json.loads(kept.pop("model.json"))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    assert "model.jaxexport (cpu, cuda, tpu)" in done.stdout
    assert f"by jax {program['jax']}, good until {program['good_until']}" in done.stdout
    program = jax.export.deserialize((tmp_path / "out" / "model.jaxexport").read_bytes())
    assert program.call(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 2)


@pytest.mark.slow
def test_what_is_no_run_is_not_exported(tmp_path):
    done = script("export", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "holds no run with a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
