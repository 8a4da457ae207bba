"""Every format and source gives the same trees; other files give clear errors."""

import errno
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_torch_file import whole, write
from safetensors.numpy import load_file, save_file

from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.weights_only import read_weights, save_weights
from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.weights import load, read, save

MODEL = create("cifar_resnet8", num_classes=5)
SHARED = Path(__file__).parents[2].parent / "shared"


def torch_file(path, tensors, form):
    content = {n: whole("FloatStorage", x, key=str(i)) for i, (n, x) in enumerate(tensors.items())}
    return write(path / "w.pth", {"state_dict": content, "epoch": 7}, form)


def run(path, trees, *, ended):
    """Writes a run's folder. During a stage, the trained arrays of the best epoch are separate."""
    expected = {"params": trees[0], "stats": trees[1]}
    others = jax.tree.map(lambda x: x + 1, expected)
    frozen = jax.tree.map(lambda _: None, expected)
    best = {
        "params": frozen["params"] | {"fc": expected["params"]["fc"]},
        "stats": frozen["stats"],
        "opt_state": {"count": jnp.zeros(())},
    }
    last = expected["params"] | {"fc": others["params"]["fc"]}
    items = expected if ended else expected | {"params": last, "best": best}
    with closing(Checkpoints(path / "checkpoints")) as checkpoints:
        checkpoints.save(9, {}, others)
        checkpoints.save(10, {}, items)
    return path


def orbax(path, trees):
    save_weights(path / "w", *trees)
    return path / "w"


def export(path, trees):
    save(path / "model.safetensors", MODEL, *trees)
    return path


FORMS = {
    "safetensors": lambda path, trees, tensors: export(path, trees) / "model.safetensors",
    "torch, zip": lambda path, trees, tensors: torch_file(path, tensors, "zip"),
    "torch, legacy": lambda path, trees, tensors: torch_file(path, tensors, "legacy"),
    "Orbax": lambda path, trees, tensors: orbax(path, trees),
    "run within a stage": lambda path, trees, tensors: run(path, trees, ended=False),
    "run after a stage": lambda path, trees, tensors: run(path, trees, ended=True),
    "checkpoint of a run": lambda path, trees, tensors: (
        run(path, trees, ended=True) / "checkpoints" / "10"
    ),
    "export of a run": lambda path, trees, tensors: export(path, trees),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_read_of_every_format_is_bit_for_bit(make, trees, tensors, tmp_path):
    source = read(make(tmp_path, trees, tensors))
    assert source.num_classes(MODEL) == 5
    loaded = load(source, MODEL)
    assert jax.tree.structure(loaded) == jax.tree.structure(trees)
    jax.tree.map(np.testing.assert_array_equal, loaded, trees)


@pytest.mark.parametrize("best", [True, False], ids=["within a stage", "after a stage"])
def test_read_weights_without_statistics(best, tmp_path):
    params = {"body": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(2)}}
    last = {"body": params["body"], "head": {"kernel": jnp.zeros(2)}}
    trained = {"body": {"kernel": None}, "head": params["head"]}
    items = (
        {"params": last, "best": {"params": trained, "stats": {}}} if best else {"params": params}
    )
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, items | {"stats": {}})
    restored, stats = read_weights(tmp_path)
    assert stats == {}
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_num_classes_of_a_head_with_two_layers(tmp_path):
    model = create("cifar_resnet8", num_classes=7, concat_pool=True)
    save(tmp_path / "w", model, *model.init(jax.random.key(0)))
    assert read(tmp_path / "w").num_classes(model) == 7


def test_read_remarks_on_the_chosen_entry(tensors, tmp_path):
    path = torch_file(tmp_path, tensors, "zip")
    assert any("'state_dict'" in r and "'epoch'" in r for r in read(path).remarks)
    with pytest.warns(UserWarning, match="Used 'state_dict' of .*'epoch'"):
        load(path, MODEL)


def test_read_of_a_named_entry(tensors, tmp_path):
    model = {n: whole("FloatStorage", x, key=str(i)) for i, (n, x) in enumerate(tensors.items())}
    ema = {n: whole("FloatStorage", x + 1, key=f"e{n}") for n, x in tensors.items()}
    path = write(tmp_path / "w.pth", {"model": model, "model_ema": ema}, "zip")
    for entry, expected in (("", 1), ("#entry=model", 0), ("#entry=model_ema", 1)):
        conv = read(f"{path}{entry}").tensors["conv1.weight"].read()
        np.testing.assert_array_equal(conv, tensors["conv1.weight"] + expected)


EMPTY = {
    "empty folder": lambda path: path.mkdir(),
    "other Orbax": lambda path: save_weights(path, {}, {"bn1": {"mean": jnp.zeros(3)}}),
    "foreign folder": lambda path: (path / "x").mkdir(parents=True),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_load_of_folders_without_weights(make, tmp_path):
    make(tmp_path / "w")
    with pytest.raises(WeightsError, match=str(tmp_path)):
        load(tmp_path / "w", MODEL)


PEAK_MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
from jaxft import models, weights

model = models.create("resnet34")
source = weights.read(sys.argv[1])
head = {"kernel": jnp.zeros((512, 1000)), "bias": jnp.zeros(1000)} if sys.argv[2] else "keep"
jnp.zeros(9).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params, stats = weights.load(source, model, head=head)
jax.block_until_ready(params)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("head", ["", "another"])
def test_load_peak_memory_is_below_twice_the_file(form, head, tmp_path):
    """The file is 87 MB. The network's initialisation is not computed."""
    model = create("resnet34")
    trees = jax.tree.map(
        lambda x: np.ones(x.shape, np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )
    path = tmp_path / "w.safetensors"
    save(path, model, *trees)
    if form != "safetensors":
        tensors = load_file(path)
        path = write(
            tmp_path / "w.pth",
            {n: whole("FloatStorage", x, key=str(i)) for i, (n, x) in enumerate(tensors.items())},
            form,
        )
    arguments = [sys.executable, "-c", PEAK_MEMORY, path, head]
    peak = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert peak < 2 * path.stat().st_size


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs the shared CIFAR-10 weights")
def test_read_of_a_cifar_10_checkpoint():
    source = read(SHARED / "weights" / "resnet20_cifar10.th")
    assert any("'module.'" in remark for remark in source.remarks)
    params, _ = load(source, create("cifar_resnet20", num_classes=10))
    assert params["fc"]["kernel"].shape == (64, 10)
    assert 0.1 < float(jnp.abs(params["fc"]["kernel"]).mean()) < 1


def test_load_refuses_two_tensors_for_one(tensors, tmp_path):
    body = {name: tensor for name, tensor in tensors.items() if name != "fc.bias"}
    heads = dict.fromkeys(["head.bias", "linear.bias"], tensors["fc.bias"])
    save_file(body | heads, tmp_path / "w")
    with pytest.raises(WeightsError, match=r"head\.bias and linear\.bias \(both fc\.bias\)"):
        load(tmp_path / "w", MODEL)


def test_load_prefers_a_head_with_the_torchvision_name(tensors, tmp_path):
    save_file(tensors | {"linear.bias": np.zeros(5, "f4")}, tmp_path / "w")
    with pytest.raises(WeightsError, match=r"not in the network \(1\):\n +linear.bias \[5\]"):
        load(tmp_path / "w", MODEL)


NO_WEIGHTS = {
    "a run without a checkpoint": (["run/recipe.yaml"], "run", "has no checkpoint yet"),
    "a run that has begun": (["run/recipe.yaml", "run/checkpoints/"], "run", "wait for the first"),
    "a folder of images": (["data/a.jpg"], "data", "Name a run's folder, one of its checkpoints"),
    "a folder with a file": (["w/a.pth", "w/b.txt"], "w", "Name a file in it: .*a.pth"),
    "an empty file": (["a.pth"], "a.pth", "is empty. Download it again"),
    "model.json": (["model.json"], "model.json", "is JSON, not weights. Name the weights"),
    "text": (["notes.txt"], "notes.txt", "Name a .safetensors file, or one that torch.save"),
}


@pytest.mark.parametrize(("files", "source", "message"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_read_without_weights_suggests_a_source(files, source, message, tmp_path):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name != "a.pth":
            path.write_text('{"classes": []}' if name.endswith(".json") else "some text")
        else:
            path.touch()
    with pytest.raises(WeightsError, match=message):
        read(tmp_path / source)


def test_read_of_a_numpy_file_suggests_from_state_dict(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.save(tmp_path / "b.npy", np.ones(3))
    for name in ("a.npz", "b.npy"):
        with pytest.raises(WeightsError, match="from_state_dict takes NumPy's arrays"):
            read(tmp_path / name)


def test_read_without_permission_names_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.pth").write_bytes(b"weights")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(WeightsError, match=r"a\.pth cannot be read: Permission denied\."):
        read(tmp_path / "a.pth")
