"""Whole runs with LoRA: adapters first, the merged network later."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from mortal import QUIET, RECIPE, assert_same_end, killed, rows, steps, train, train_to_end
from safetensors.numpy import load_file

import jaxft
from jaxft import Classifier, PatternError, RecipeError, Stage, WiSE, data, finetune, weights
from jaxft.checkpoint.contents import Snapshot
from jaxft.checkpoint.weights_only import read_weights
from jaxft.data import Preprocessing, Splits
from jaxft.devices import Devices
from jaxft.export import _write_adapters
from jaxft.labels import FROZEN, leaf_labels
from jaxft.models import Linen
from jaxft.models.lora_model import split_adapters, with_lora
from jaxft.models.nnx_adapter import init_shapes
from jaxft.open_recipe import open_network
from jaxft.recipe_file import save
from jaxft.report.run_record import read_record
from jaxft.report.run_report import reopened_report
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.stage_program import build_programs
from jaxft.weights.lora_file import load_lora

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from user_modules import Compact

pytestmark = pytest.mark.usefixtures("shared_programs")

# Stages end at steps 4, 12 and 20.
ADAPTED = dataclasses.replace(
    RECIPE,
    lora={"layer3": 2, "layer2": 1},
    lora_alpha=4.0,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=1),
        Stage("adapters", {"fc": 1e-2, "**.lora_*": 1e-2}, epochs=2, restore="last"),
        Stage("all", {"*": 1e-3}, epochs=2, restore="last", merge_lora=True),
    ),
)
TWO_STAGES = dataclasses.replace(ADAPTED, stages=ADAPTED.stages[:2])


def flat(tree):
    """Maps paths to arrays."""
    return dict(zip(jaxft.paths(tree), jax.tree.leaves(tree), strict=True))


def params_at(workdir, step):
    return read_weights(workdir / "checkpoints" / str(step))[0]


def changed(before, after):
    before, after = flat(before), flat(after)
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    train_to_end(workdir, ADAPTED)
    return workdir


@pytest.mark.slow
def test_only_labelled_adapters_train_and_the_merged_stage_freezes_them(unbroken):
    head, adapters, merged = (params_at(unbroken, step) for step in (4, 12, 20))
    moved = changed(head, adapters)
    assert moved == {"fc.bias", "fc.kernel"} | {p for p in flat(head) if "lora_" in p}
    model = with_lora(ADAPTED.network(5), ADAPTED.lora, ADAPTED.lora_alpha)
    folded = model.merge_and_reset(adapters)
    assert changed(folded, merged) == {path for path in flat(head) if "lora_" not in path}


@pytest.mark.slow
def test_export_is_the_merged_network_under_its_names(unbroken):
    tensors = load_file(unbroken / "model.safetensors")
    assert not [name for name in tensors if "lora" in name]
    network = ADAPTED.network(5)
    exported, _ = weights.load(unbroken / "model.safetensors", network)
    from_checkpoint, _ = weights.load(unbroken / "checkpoints", network)
    end, adapters = split_adapters(params_at(unbroken, 20))
    assert changed(exported, from_checkpoint) == changed(exported, end) == set()
    assert not any(adapter["lora_b"].any() for adapter in adapters.values())
    assert not (unbroken / "adapter").exists()  # it would change other kernels than these


def test_merged_export_deletes_the_adapters_of_an_earlier_export(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    model = with_lora(ADAPTED.network(5), ADAPTED.lora, ADAPTED.lora_alpha)
    _write_adapters(tmp_path, ADAPTED, model, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoint_with_adapters_predicts_as_the_run(unbroken):
    """Other code reads the merged network, whose logits are those of the run to rounding."""
    params, stats = read_weights(unbroken / "checkpoints/12")
    model = with_lora(ADAPTED.network(5), ADAPTED.lora, ADAPTED.lora_alpha)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    loaded = Classifier.load(unbroken / "checkpoints/12")
    run = dataclasses.replace(loaded, model=model, params=params, stats=stats)
    assert not [path for path in jaxft.paths(loaded.params) if "lora" in path]
    expected, found = (each.predict(images).probabilities for each in (run, loaded))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_killed_run_with_adapters_ends_as_unbroken(unbroken, tmp_path):
    """Within a stage of adapters, at its end, and before and within the merged stage."""
    for point, at in (("step", 8), ("save", 12), ("step", 13), ("step", 19)):
        with killed(point, at):
            train(tmp_path / "run", ADAPTED)
    train_to_end(tmp_path / "run", ADAPTED)
    assert_same_end(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_fork_from_a_stage_of_adapters_ends_as_the_run(unbroken, tmp_path):
    finetune(ADAPTED, tmp_path / "fork", fork_from=unbroken, stage="adapters", console=QUIET)
    assert_same_weights(tmp_path / "fork", unbroken)
    assert rows(tmp_path / "fork") == rows(unbroken)[-2:]


def assert_same_weights(workdir, other):
    name = "model.safetensors"
    assert (workdir / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_run_that_ends_with_adapters_saves_them_as_peft(tmp_path):
    """Together with the pretrained network and the head they are the exported network."""
    train_to_end(tmp_path, TWO_STAGES)
    network = TWO_STAGES.network(5)
    pretrained, _ = weights.load(TWO_STAGES.weights, network, head="fresh")
    adapters, alpha = load_lora(tmp_path / "adapter", pretrained)
    assert alpha == 4.0
    merged = jaxft.merge_lora(pretrained, adapters, alpha=alpha)
    exported, _ = weights.load(tmp_path / "model.safetensors", network)
    assert changed(merged, exported) == {"fc.bias", "fc.kernel"}
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    kernel = tensors["base_model.model.fc.weight"].T
    assert np.array_equal(kernel, exported["fc"]["kernel"])


@pytest.mark.slow
def test_merged_run_starts_another(unbroken, tmp_path):
    recipe = dataclasses.replace(TWO_STAGES, weights=str(unbroken), head="keep", lora={"layer1": 1})
    with killed("step", 1):
        train(tmp_path, recipe)
    report = reopened_report(read_record(unbroken), unbroken)
    assert "frozen" in {row[0] for row in report.tables["adapters"]}


@pytest.mark.slow
def test_wise_averages_the_merged_network_with_the_trained_one(tmp_path):
    """Alpha 0 is the start of the stage, whose kernels hold the adapters already."""
    last = dataclasses.replace(ADAPTED.stages[2], steps=1, epochs=None, finish=WiSE((0.0,)))
    recipe = dataclasses.replace(ADAPTED, stages=(*ADAPTED.stages[:2], last))
    train_to_end(tmp_path, recipe)
    *_, before, end = (params_at(tmp_path, step) for step in steps(tmp_path)[-2:])
    model = with_lora(ADAPTED.network(5), ADAPTED.lora, ADAPTED.lora_alpha)
    assert changed(jax.device_get(model.merge_and_reset(before)), end) == set()


@pytest.mark.slow
def test_run_of_user_module_with_adapters(tmp_path):
    model = Linen(Compact(), shape=(8, 8, 3), head="head")
    stages = (Stage("adapters", {"head": 1e-2, "**.lora_*": 1e-2}, epochs=1, restore="last"),)
    recipe = dataclasses.replace(
        RECIPE, model="cnn", weights=None, dropout=0.0, lora={"Conv_0": 2, "Dense_0": 1},
        stages=stages,
    )  # fmt: skip
    start = model.init(jax.random.key(5))
    finetune(recipe, tmp_path, model=model, start=start, console=QUIET)
    exported, _ = weights.load(tmp_path / "model.safetensors", model)
    assert changed(start[0], exported) == {
        "Conv_0.kernel", "Dense_0.kernel", "head.bias", "head.kernel",
    }  # fmt: skip
    adapters, alpha = load_lora(tmp_path / "adapter", start[0])
    merged = jaxft.merge_lora(start[0], adapters, alpha=alpha)
    assert changed(merged, exported) == {"head.bias", "head.kernel"}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"lora": {"layer9": 2}}, RecipeError, "lora: pattern 'layer9' matches no parameter"),
        (
            {"lora": {}, "lora_alpha": None},
            RecipeError,
            "merge_lora has no adapters to merge: set the recipe's lora",
        ),
        ({"lora": {"layer3": 1.5}}, RecipeError, r"lora.layer3: Input should be a valid integer"),
        ({"lora_alpha": -1.0}, RecipeError, "lora_alpha is -1.0; it must be positive"),
        (
            {"stages": (Stage("all", {"**.lora_*": 1e-3}, epochs=1, merge_lora=True),)},
            PatternError,
            r"matches only leaves that never train: .*lora_a \(MergedAdapter\)",
        ),
    ],
)
def test_run_rejects_adapters(fields, error, message, tmp_path):
    recipe = dataclasses.replace(ADAPTED, **{"stages": ADAPTED.stages[2:], **fields})
    with pytest.raises(error, match=message):
        train(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_plan_freezes_the_adapters_of_a_merged_stage():
    model = with_lora(ADAPTED.network(5), ADAPTED.lora, None)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    *_, merged = jaxft.plan(ADAPTED.stages, params)
    labels = dict(zip(jaxft.paths(params), leaf_labels(params, merged.labels), strict=True))
    assert {path for path, label in labels.items() if label == FROZEN} == {
        path for path in labels if "lora_" in path
    }


@pytest.mark.slow
def test_step_of_adapters_saves_optimizer_state_and_no_backward_pass():
    """The gradient of a merged kernel is that of full fine-tuning."""
    stages = (
        Stage("adapters", {"**.lora_*": 1e-3}, epochs=1),
        Stage("kernels", {"layer[23].**.kernel": 1e-3}, epochs=1),
    )
    recipe = dataclasses.replace(ADAPTED, stages=stages, cache_mib=0).expecting(Preprocessing())
    images = data.arrays(np.zeros((16, 8, 8, 3), np.uint8), np.arange(16) % 5, "abcde")
    model = open_network(recipe, None, images.classes)
    params, stats = init_shapes(model)
    programs = build_programs(recipe, model, Splits(images, images), Devices(), (params, stats))
    states = [jax.eval_shape(program.transform().init, params) for program in programs]
    adapters, kernels = (
        compile_stage(program, Snapshot(params, stats, state)).flops
        for program, state in zip(programs, states, strict=True)
    )
    assert 0.95 * kernels < adapters < kernels
    sizes = [sum(x.size for x in jax.tree.leaves(state) if x.ndim) for state in states]
    layers = [params["layer2"], params["layer3"]]
    trained = [
        sum(x.size for path, x in flat(layers).items() if name in path)
        for name in ("lora_", "kernel")
    ]
    assert sizes == [2 * count for count in trained]  # Adam's moments


def test_recipe_with_adapters_is_saved_and_read(tmp_path):
    save(ADAPTED, tmp_path / "recipe.yaml")
    assert jaxft.recipe_file.read(tmp_path / "recipe.yaml") == ADAPTED
