"""The start of a run: the caller's arrays, of any dtype, with any head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET, killed

import jaxft
from jaxft import (
    Adam,
    ModelError,
    ParallelError,
    Recipe,
    RecipeError,
    Stage,
    WeightsError,
    data,
    finetune,
    models,
    weights,
)
from jaxft.export import export
from jaxft.stage_plan import untrained_frozen_remarks


class Net(nn.Module):
    """Compiles in a moment."""

    classes: int = 3
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4, param_dtype=self.param_dtype)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.classes, name="head", param_dtype=self.param_dtype)(x)


def network(classes=3, **fields):
    return models.Linen(Net(classes, **fields), shape=(4, 4, 3), head="head")


NET = network()
IMAGES = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3), np.uint8)
GIVEN = {"data": data.arrays(IMAGES, np.arange(21) % 3, classes="abc"), "console": QUIET}
ALL = Recipe(
    model="net",
    data="noise",
    image_size=4,
    resize_size=4,
    augment="none",
    batch_size=8,
    optimizer=Adam(),
    stages=(Stage("all", {"*": 1e-4}, 2, restore="last"),),
)
HEAD = dataclasses.replace(ALL, stages=(Stage("head", {"head": 1e-9}, 1, restore="last"),))


def arrays(dtype=jnp.float32, *, classes=3):
    return jax.tree.map(lambda x: np.asarray(x, dtype), network(classes).init(jax.random.key(3)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_start_of_another_dtype_trains_in_float32(dtype, tmp_path, capsys):
    start, given = arrays(dtype), {**GIVEN, "model": NET}
    result = finetune(ALL, tmp_path / "whole", start=start, **{**given, "console": None})
    remark = f"8 arrays of start are cast from {np.dtype(dtype).name} to float32."
    assert remark in capsys.readouterr().out
    params, stats = weights.load(result.weights, NET)
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {np.dtype("float32")}
    before = np.asarray(start[0]["Dense_0"]["kernel"], np.float32)
    assert np.mean(params["Dense_0"]["kernel"] != before) > 0.9
    with killed("step", 4):
        finetune(ALL, tmp_path / "run", start=start, **given)
    again = finetune(ALL, tmp_path / "run", **given)
    assert again.weights.read_bytes() == result.weights.read_bytes()


@pytest.mark.slow
def test_network_keeps_its_own_dtype(tmp_path):
    model = network(param_dtype=jnp.bfloat16)
    result = finetune(ALL, tmp_path / "whole", model=model, start=arrays(), **GIVEN)
    with killed("step", 4):
        finetune(ALL, tmp_path / "run", model=model, start=arrays(), **GIVEN)
    again = finetune(ALL, tmp_path / "run", model=model, **GIVEN)
    assert again.weights.read_bytes() == result.weights.read_bytes()
    params, stats = weights.load(result.weights, model)
    assert params["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert stats["BatchNorm_0"]["mean"].dtype == np.float32


def changed(**modules):
    params, stats = arrays()
    return {k: v for k, v in {**params, **modules}.items() if v is not None}, stats


WRONG = {
    "integers": (
        lambda: changed(Dense_0={"kernel": np.ones((48, 4), int), "bias": np.ones(4)}),
        r"\n  0.Dense_0.kernel: int64, not floating point$",
    ),
    "integers in the head": (
        lambda: changed(head={"kernel": np.ones((4, 3), int), "bias": np.ones(3)}),
        r"\n  0.head.kernel: int64, not floating point$",
    ),
    "strings": (
        lambda: changed(Dense_0={"kernel": "ones", "bias": np.ones(4)}),
        r"\n  0.Dense_0.kernel: <U4, not floating point$",
    ),
    "missing": (
        lambda: changed(BatchNorm_0=None),
        r"\n  0.BatchNorm_0.bias: missing \[4\]\n  0.BatchNorm_0.scale: missing \[4\]$",
    ),
    "extra": (lambda: changed(w=np.ones(2)), r"\n  0.w: \[2\] is not in the network$"),
    "shape": (
        lambda: changed(Dense_0={"kernel": np.ones((12, 4)), "bias": np.ones(4)}),
        r"\n  0.Dense_0.kernel: \[12, 4\], not \[48, 4\]$",
    ),
    "params alone": (lambda: arrays()[0], r"start must be \(params, stats\), .* it is a dict"),
}


@pytest.mark.parametrize(("start", "message"), WRONG.values(), ids=WRONG)
def test_start_that_does_not_fit_is_refused(start, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        finetune(ALL, tmp_path / "run", model=NET, start=start(), **GIVEN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("head", ["fresh", "zeros"])
@pytest.mark.parametrize("start", [arrays(classes=7), changed(head=None)], ids=["size", "missing"])
def test_start_with_another_head_gets_new_head(head, start, tmp_path, capsys):
    recipe = dataclasses.replace(HEAD, head=head)
    result = finetune(recipe, tmp_path, model=NET, start=start, **{**GIVEN, "console": None})
    said = " ".join(capsys.readouterr().out.split())
    assert f"start, head, does not fit 3 classes: a new one is drawn (head={head!r})." in said
    params, _ = weights.load(result.weights, NET)
    np.testing.assert_array_equal(params["Dense_0"]["kernel"], start[0]["Dense_0"]["kernel"])
    drawn = NET.init(jax.random.key(recipe.seed))[0]["head"]["kernel"]
    expected = drawn if head == "fresh" else 0 * drawn
    np.testing.assert_allclose(params["head"]["kernel"], expected, atol=1e-6)


def test_start_keeps_head_that_fits(tmp_path):
    result = finetune(HEAD, tmp_path, model=NET, start=arrays(), **GIVEN)
    params, _ = weights.load(result.weights, NET)
    expected = arrays()[0]["head"]["kernel"]
    np.testing.assert_allclose(params["head"]["kernel"], expected, atol=1e-6)


def test_float64_needs_x64(tmp_path):
    recipe = dataclasses.replace(ALL, model="cifar_resnet8", dtype="float64")
    with pytest.raises(RecipeError, match="Turn float64 on: set the environment variable JAX_EN"):
        finetune(recipe, tmp_path / "run", **GIVEN)


@pytest.mark.slow
def test_float64_run_resumes_bit_identically(tmp_path):
    fields = {
        "model": "cifar_resnet8",
        "dtype": "float64",
        "stages": (Stage("all", {"*": 1e-4}, 2),),
    }
    recipe = dataclasses.replace(ALL, **fields)
    with jax.enable_x64(True):
        result = finetune(recipe, tmp_path / "whole", **GIVEN)
        with killed("step", 4):
            finetune(recipe, tmp_path / "run", **GIVEN)
        again = finetune(recipe, tmp_path / "run", **GIVEN)
        model = recipe.network(3)
        trees = weights.load(result.weights, model)
        start = model.init(jax.random.key(0))
    assert again.weights.read_bytes() == result.weights.read_bytes()
    assert {x.dtype for x in jax.tree.leaves((trees, start))} == {np.dtype("float64")}
    kernel = np.asarray(trees[0]["conv1"]["kernel"])
    assert (np.float32(kernel) != kernel).any()
    drawn = models.create("cifar_resnet8", num_classes=3).init(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, start, drawn))  # as torch's .double()


def test_frozen_random_weights_are_named(tmp_path, capsys):
    finetune(HEAD, tmp_path / "run", model=NET, **{**GIVEN, "console": None})
    said = " ".join(capsys.readouterr().out.split())
    assert "Stage 'head' freezes random weights: BatchNorm_0, Dense_0. Nothing pretrained" in said
    assert "Compiling stage 'head' ..." in said
    assert "nan" not in said
    params = arrays()[0]
    assert not untrained_frozen_remarks(jaxft.plan((*ALL.stages, *HEAD.stages), params), params)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"image_size": 8, "resize_size": 8},
            ModelError,
            r"^Net takes images of shape \(4, 4, 3\), and the recipe's are \(8, 8, 3\): set the",
        ),
        ({"remat": True}, RecipeError, "and Net has no blocks before its head, or only one"),
    ],
    ids=["image_size", "remat"],
)
def test_recipe_that_does_not_fit_user_model_is_refused(fields, error, message, tmp_path):
    with pytest.raises(error, match=message):
        finetune(dataclasses.replace(ALL, **fields), tmp_path / "run", model=NET, **GIVEN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Unable to initialize backend 'cuda': none.\nmore"), AssertionError()],
    ids=["refused", "no plugin"],
)
def test_missing_devices_are_one_error(error, tmp_path, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ParallelError, match=r"JAX cannot use .*, as JAX_PLATFORMS asks: "):
        finetune(ALL, tmp_path / "run", model=NET, **GIVEN)


def test_export_needs_the_user_model(tmp_path):
    recipe = dataclasses.replace(HEAD, model="cifar_resnet8")
    finetune(recipe, tmp_path, model=NET, start=arrays(), **GIVEN)
    with pytest.raises(WeightsError, match=r"is exported with it: jaxft\.export"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ModelError, match=r"Net cannot be exported .*(?s:.*)x.shape\[0\], not len"):
        export(tmp_path, tmp_path / "out", model=NET, platforms=("cpu",))
