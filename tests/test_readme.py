"""What the README says, done: its commands are those of the house, its examples run."""

import re
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from narrow import narrowed

import jaxft
from jaxft.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
}
FIVE_LINES, *FRAMEWORKS = EXAMPLES["Freezing in five lines"]


def test_ci_runs_the_readmes_test_command():
    lines = [line for line in README.splitlines() if "pytest" in line]
    assert len(lines) == 1  # which .ci/run looks for
    assert "grep -m 1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_library_example_trains_the_head_alone():
    names = {}
    exec(EXAMPLES["In your own JAX code"][0], names)
    assert (names["params"]["body"]["kernel"] == 1).all()
    assert (names["params"]["head"]["kernel"] != 1).all()


@pytest.mark.slow
def test_the_weights_example_goes_there_and_back(tmp_path, monkeypatch):
    model = jaxft.models.create("resnet18")
    trees = jax.tree.map(
        lambda x: np.full(x.shape, 0.01, np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )
    jaxft.weights.save(tmp_path / "resnet18.safetensors", model, *trees)
    monkeypatch.chdir(tmp_path)
    names = {"images": jnp.ones((1, 64, 64, 3))}
    exec(EXAMPLES["Pretrained weights"][0], names)
    assert names["logits"].shape == (1, 1000)
    assert names["features"].shape == (1, 4, 4, 256)
    files = (tmp_path / name for name in ("resnet18.safetensors", "again.safetensors"))
    assert len({file.read_bytes() for file in files}) == 1


def moved(before, after):
    """The roots of the parameters that are not bit-identical."""
    named = zip(
        *map(jaxft.paths, (before, after)), *map(jax.tree.leaves, (before, after)), strict=True
    )
    changed = []
    for path, same_path, old, new in named:
        assert path == same_path
        same = np.asarray(old).tobytes() == np.asarray(new).tobytes()  # 0.0 is not -0.0
        changed += [] if same else [path.split(".")[0]]
    return set(changed)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=["dict", "linen", "nnx", "haiku", "equinox"])
def test_five_lines_freeze_in_every_framework(framework):
    assert len(FIVE_LINES.splitlines()) == 5
    x = jax.random.normal(jax.random.key(7), (5, 4))
    names = {"jax": jax, "jnp": jnp, "optax": optax, "jaxft": jaxft, "x": x}
    names |= {"nn": nn, "nnx": nnx, "hk": hk, "eqx": eqx}
    exec(framework, names)
    before = names["params"]
    exec(FIVE_LINES, names)
    half = optax.apply_updates(names["trainable"], names["updates"])
    after = jaxft.combine(half, names["frozen"])
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert moved(before, after) == {"head"}

    exec(EXAMPLES["Stages in your own loop"][0], names)
    assert moved(before, names["params"]) == {"body", "head"}
    states = names["opt_state"].inner_states
    counts = {name: int(states[name].inner_state.rule.count) for name in ("head", "*")}
    assert counts == {"head": 50, "*": 30}


def test_the_recipe_example_is_a_recipe():
    names = {}
    exec(EXAMPLES["From the command line"][0], names)
    assert isinstance(names["recipe"], Recipe)


@pytest.mark.slow
def test_the_data_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES["Data"][0], names)
    assert (tmp_path / "runs/noise/model.safetensors").samefile(names["result"].weights)


@pytest.mark.slow
def test_the_example_with_a_network_of_ones_own_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES["A network of your own"][0], names)
    assert (tmp_path / "runs/cnn/model.safetensors").samefile(names["result"].weights)


@pytest.mark.slow
def test_the_pytorch_example_finds_the_optimizer_that_is_new():
    torch = pytest.importorskip("torch")
    from torch_network import ResNet

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((n, 32, 32, 3)), rng.integers(0, 3, n)) for n in (8, 5)]
    names, said = {"module": ResNet(), "batches": batches}, []
    example, *_ = EXAMPLES["A PyTorch recipe, step for step"]
    names["print"] = lambda report: said.append(str(report))
    with narrowed(()):
        exec(example, names)
    assert "differ in stage 'late' (2 of 2), step 1, first in moments:" in said[0]
