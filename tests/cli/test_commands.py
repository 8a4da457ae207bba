"""Commands of the `jaxft` program: one clear error, and no partial output."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import call
from PIL import Image
from safetensors.numpy import load_file

from jaxft import Recipe, RecipeError, models, weights
from jaxft.cli.evaluate import open_images
from jaxft.recipe_file import read

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.py"


def finetune(*arguments):
    return call("finetune", *arguments)


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stages.0.epochs", "0"], "it has 0 epochs"),
        (["--stages.0.train.fc", "-1"], "rate of 'fc' is -1.0"),
        (["--bacth-size", "3"], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--model", "cifar_resnet9"], "RecipeError: .*cifar_resnet8"),
        pytest.param(["--model", "cifar_resnet20"], "WeightsError: .*", marks=pytest.mark.slow),
        (["--weights", "nowhere.safetensors"], "WeightsError: .*nowhere.safetensors"),
        (["--weights", "asset:nothing"], "WeightsError: asset:nothing: no such asset.*digits_0to4"),
        (["--data", "digits:7-11"], "DataError: "),
        (["--data", "folder:nowhere"], "DataError: .*nowhere"),
        (["--shots", "1000"], "DataError: shots=1000"),
        (["--train-split", "train[:0]"], "DataError: split 'train.:0.' is empty"),
        (["--val-split", "test"], "DataError: .*no split test"),
        (["--random-erasing", "2"], "random_erasing is 2.0; a probability lies between"),
        pytest.param(
            ["--drop-last", "True", "--batch-size", "11"],
            "DataError: stage '.*': drop_last leaves nothing of 10",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_finetune_reports_bad_options(options, expected, tmp_path):
    done = finetune(QUICKSTART, "--workdir", tmp_path / "run", *options)
    assert done.returncode != 0
    assert re.search(expected, done.stdout + done.stderr), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(empty_class, "val/bees"), (text_as_image, "train/ants/1.jpg")],
    ids=["empty_class", "text_as_image"],
)
def test_finetune_reports_bad_folders(damage, expected, tmp_path):
    folder = image_folder(tmp_path / "images")
    damage(folder)
    config = small_config(tmp_path)
    done = finetune(config, "--workdir", tmp_path / "run", "--data", f"folder:{folder}")
    assert done.returncode != 0
    assert done.stderr.startswith("DataError: ")
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


def test_finetune_reports_unknown_pattern_with_near_miss(tmp_path):
    config = tmp_path / "config.py"
    text = QUICKSTART.read_text()
    config.write_text(text.replace('"layer3"', '"layer5"'))
    done = finetune(config, "--workdir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.startswith("PatternError: stage 'late': pattern 'layer5' matches no param")
    assert "Did you mean 'layer3'?" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_finetune_trains_on_folder_of_images(tmp_path):
    folder = image_folder(tmp_path / "images")
    config = small_config(tmp_path)
    done = finetune(config, "--workdir", tmp_path / "run", "--data", f"folder:{folder}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.replace(str(tmp_path), "").splitlines()
    assert [line for line in lines if len(line) > 80 or line != line.rstrip()] == []
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_finetune_help_lists_every_recipe_field():
    without = finetune("--help").stdout
    assert "CONFIG --workdir DIR" in without
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in without, field.name
    assert "--workdir DIR is required" in finetune(QUICKSTART).stderr
    done = finetune(QUICKSTART, "--help")
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


@pytest.mark.parametrize("name", ["plan", "find-lr", "export", "convert", "prepare-tfds"])
def test_output_folder_is_checked_first(name, tmp_path):
    """None of the inputs exists."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    arguments = {
        "plan": ("nowhere.py", "--topology", "cpu", "--json", out),
        "find-lr": ("nowhere.py", "--out", out),
        "export": (tmp_path / "nowhere", "--out", out),
        "convert": ("nowhere.safetensors", out, "--model", "resnet18"),
        "prepare-tfds": (tmp_path / "nowhere", out),
    }
    done = call(name, *arguments[name])
    assert done.returncode == 1
    assert re.fullmatch("RecipeError: .*file is a file; .*\n", done.stderr)


@pytest.mark.slow
def test_convert_is_lossless_both_ways(tmp_path):
    """Converts to an Orbax checkpoint and back to a torch-named file: the same bytes."""
    asset = ROOT / "jaxft/assets/digits_0to4.safetensors"
    there, back = tmp_path / "jax", tmp_path / "torch.safetensors"
    for source, out in ((asset, there), (there, back)):
        done = call("convert", source, out, "--model", "cifar_resnet8")
        assert done.returncode == 0, done.stderr
        assert "cifar_resnet8, 40 classes, 77,240 parameters" in done.stdout
    assert load_file(back).keys() == load_file(asset).keys()
    for name, array in load_file(asset).items():
        np.testing.assert_array_equal(load_file(back)[name], array)
    again = call("convert", asset, back, "--model", "cifar_resnet8")
    assert (again.returncode, "exists" in again.stderr) == (1, True)


@pytest.mark.slow
def test_convert_network_with_head_layers(tmp_path):
    model = models.create("cifar_resnet8", num_classes=2, head_layers=(5, "relu"), binary=True)
    trees = model.init(jax.random.key(0))
    weights.save(tmp_path / "w.safetensors", model, *trees, classes=["no", "yes"])
    command = ("convert", tmp_path / "w.safetensors", tmp_path / "out")
    options = ("--model", "cifar_resnet8", "--head-layers", "5", "relu")
    refused = call(*command, *options)
    assert "binary=True" in refused.stderr
    done = call(*command, *options, "--binary", "True")
    assert done.returncode == 0, done.stderr
    assert "cifar_resnet8, 2 classes, 74,971 parameters" in done.stdout
    again = weights.read(tmp_path / "out")
    assert again.network.classes == ("no", "yes")
    jax.tree.map(np.testing.assert_array_equal, weights.load(again, model), trees)


def test_convert_of_other_network_writes_nothing(tmp_path):
    done = call("convert", "asset:digits_0to4", tmp_path / "w", "--model", "resnet18")
    assert done.returncode == 1
    assert "WeightsError: asset:digits_0to4 does not fit resnet18" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_of_run(tmp_path):
    config = small_config(tmp_path)
    options = ("--data", f"folder:{image_folder(tmp_path / 'images')}")
    assert finetune(config, "--workdir", tmp_path / "run", *options).returncode == 0
    # As if the run had been killed after its checkpoint and before its end.
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("model.*")}
    for name in kept:
        (tmp_path / "run" / name).unlink()
    done = call("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    program = described.pop("program")
    assert described == json.loads(kept.pop("model.json"))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    assert "model.jaxexport (cpu, cuda, tpu)" in done.stdout
    assert f"by jax {program['jax']}, good until {program['good_until']}" in done.stdout
    program = jax.export.deserialize((tmp_path / "out" / "model.jaxexport").read_bytes())
    assert program.call(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 2)


def test_export_without_run_fails(tmp_path):
    done = call("export", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "holds no run with a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of images."""
    folder = tmp_path_factory.mktemp("trained")
    images = image_folder(folder / "images")
    options = ("--data", f"folder:{images}", "--workdir", folder / "run", "--seed", 5)
    assert finetune(small_config(folder), *options).returncode == 0
    return folder


@pytest.mark.slow
def test_evaluate_reproduces_validation_accuracy(trained, tmp_path):
    score = json.loads((trained / "run/model.json").read_text())["score"]
    for data_arguments in ((), (trained / "images",), (f"folder:{trained}/images",)):
        out = tmp_path / "new folder/scores.json"
        done = call("evaluate", trained / "run", *data_arguments, "--json", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"accuracy           {score['accuracy']:.4f}   95 % confidence" in done.stdout
        assert json.loads(out.read_text())["accuracy"] == score["accuracy"]


@pytest.mark.slow
def test_evaluate_draws_splits_with_the_seed_of_the_run(trained):
    def drawn(source, *place):
        images = open_images(source, *place, "train[:50%/class]")
        return [images.identity(i) for i in range(len(images))]

    folder = str(trained / "images")
    assert drawn(trained / "run", folder) == drawn(trained / "run", None)
    assert drawn(trained / "run", folder) != drawn(trained / "other weights", folder)


@pytest.mark.slow
def test_predict_prints_each_format(trained, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    good = trained / "images/val/ants/0.jpg"
    for form in ("table", "csv", "jsonl"):
        done = call("predict", trained / "run", good, tmp_path, "--format", form, "--top", 2)
        assert done.returncode == 1
        assert done.stderr.startswith("DataError: 1 of 2 images cannot be read:")
        assert str(good) in done.stdout
        lines = done.stdout.splitlines()
        if form == "csv":
            assert [line.count(",") for line in lines] == [2] * 4
        elif form == "jsonl":
            first, second = map(json.loads, lines)
            assert {each["class"] for each in first["predictions"]} == {"ants", "bees"}
            assert second["predictions"] == []


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("predict", ["nowhere", "a.jpg"], "WeightsError: there are no weights 'nowhere'"),
        ("predict", ["nowhere"], "arguments are required: IMAGES"),
        ("predict", ["nowhere", "a.jpg", "--top", "0"], "'0' is no number from 1 on"),
        ("evaluate", ["nowhere"], "DataError: nowhere is not the folder of a run: name the DATA"),
        ("evaluate", ["nowhere", "tfsd:x"], "DataError: unknown data 'tfsd:x'. Did you mean 'tfds"),
        ("evaluate", ["nowhere", "digits", "--split", "test"], "DataError: .* has no split test"),
        ("evaluate", ["nowhere", "digits:5-6"], "WeightsError: there are no weights 'nowhere'"),
    ],
)
def test_predict_and_evaluate_report_mistakes(command, arguments, message):
    done = call(command, *arguments)
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_finetune_on_images_without_a_recipe(tmp_path):
    images = image_folder(tmp_path / "images")
    options = ("--model", "cifar_resnet8", "--weights", "None", "--image-size", "16")
    workdir = tmp_path / "run"
    done = finetune(
        images, "--workdir", workdir, *options, "--strategy", "norms", "--epochs", 1, "--lr", 0.01
    )
    assert (done.returncode, "Validation accuracy" in done.stdout) == (0, True), done.stderr
    recipe = read(workdir / "recipe.yaml")
    assert recipe.data == f"folder:{images}"
    assert recipe.stages[0].train == {"fc": 0.1, "**.scale": 0.1, "**.bias": 0.1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "nowhere"],
            r"nowhere is neither a recipe \(a .py or .yaml file\), nor a fol",
        ),
        (["finetune", "tfsd:x", "--weights", "None"], "unknown data 'tfsd:x'. Did you mean 'tfds"),
        (["finetune", "digits", "--model", "resnet50d"], "resnet50d has no default weights: name"),
        (["finetune", "digits", "--strategy", "lpft"], "no strategy is called 'lpft'.*'lp-ft'"),
        (["finetune", "digits", "--stages.0.norms", "batch"], "options: --stages.0.norms"),
        (["compare", "digits", "--optimizer.momentum", "0"], "options: --optimizer.momentum"),
        (["finetune", QUICKSTART, "--strategy", "full"], "--strategy is for images without a rec"),
        (["finetune", "digits", "--model", "resnt50"], "no model is called 'resnt50'. Did you"),
        (["compare", "digits", "--strategies", "lpft", "--weights", "None"], "called 'lpft'"),
        (["compare", "digits", "--seeds", "0"], "'0' is no number from 1 on"),
        (["compare", "nowhere", "--weights", "None"], "nowhere is neither a recipe"),
    ],
)
def test_finetune_and_compare_report_mistakes(arguments, message, tmp_path):
    done = call(*arguments, "--workdir", tmp_path / "run")
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()
