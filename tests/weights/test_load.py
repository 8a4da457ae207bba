"""Strict loading: matching files load bit for bit, all mismatches are reported at once."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.errors import WeightsError
from jaxft.models import create
from jaxft.weights import from_state_dict, load, save

MODEL = create("cifar_resnet8", num_classes=5)
SHARED = Path(__file__).parents[2].parent / "shared"


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path)
    return path


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_load_restores_saved_weights_bit_for_bit(trees, tmp_path):
    save(tmp_path / "w", MODEL, *trees)
    loaded = load(tmp_path / "w", MODEL)
    assert_identical(loaded, trees)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float64])
def test_load_casts_other_floats_to_float32(dtype, tensors, trees, tmp_path):
    path = write(tmp_path / "w", {n: x.astype(dtype) for n, x in tensors.items()})
    loaded = load(path, MODEL)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    rounded = [np.asarray(x).astype(dtype).astype(np.float32) for x in jax.tree.leaves(trees)]
    assert_identical(loaded, jax.tree.unflatten(jax.tree.structure(trees), rounded))


def test_load_ignores_batch_counters(tensors, trees, tmp_path):
    counters = {f"{n}.num_batches_tracked": np.array(7) for n in ("bn1", "layer1.0.bn1")}
    assert_identical(load(write(tmp_path / "w", tensors | counters), MODEL), trees)


HEADS = {
    "same": {},
    "other classes": {"fc.weight": np.ones((9, 64), "f4"), "fc.bias": np.ones(9, "f4")},
    "none": {"fc.weight": None, "fc.bias": None},
    "other layers": {"fc.0.weight": np.ones((3, 64), "f4"), "fc.bias": None},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_load_with_a_fresh_head(head, tensors, trees, tmp_path):
    content = {n: x for n, x in (tensors | head).items() if x is not None}
    key = jax.random.key(3)
    loaded = load(write(tmp_path / "w", content), MODEL, head="fresh", key=key)
    expected = trees[0] | {"fc": MODEL.init(key)[0]["fc"]}, trees[1]
    assert_identical(loaded, expected)


def test_load_with_a_fresh_head_is_strict_for_the_body(tensors, tmp_path):
    content = {n: x for n, x in tensors.items() if n not in ("bn1.bias", "fc.bias")}
    with pytest.raises(WeightsError, match=r"missing \(1\):\n    bn1\.bias"):
        load(write(tmp_path / "w", content), MODEL, head="fresh")


# Changes to a matching file, and texts in the error.
MISMATCHES = {
    "missing": ({"conv1.weight": None}, ["36 of the network's 37", "conv1.weight [16, 3, 3, 3]"]),
    "extra": ({"neck.bias": np.ones(3, "f4")}, ["not in the network (1)", "neck.bias [3]"]),
    "shape": ({"bn1.bias": np.ones(3, "f4")}, ["another shape (1)", "bn1.bias [3], not [16]"]),
    "hwio": ({"conv1.weight": np.ones((3, 3, 3, 16), "f4")}, ["[3, 3, 3, 16], not [16, 3, 3, 3]"]),
    "integers": (
        {"bn1.bias": np.ones(16, "i4")},
        ["of a type that is not F16, BF16, F32 or F64 (1)", "bn1.bias I32"],
    ),
    "all at once": (
        {"conv1.weight": None, "x": np.ones(2, "f4"), "fc.bias": np.ones(9, "f4")},
        ["35 of", "missing (1)", "not in the network (1)", "another shape (1)"],
    ),
    "head": (HEADS["other classes"], ["fc.weight [9, 64], not [5, 64]", 'head="fresh"']),
    "no head": (HEADS["none"], ["fc.weight [5, 64]", 'head="fresh"']),
    "many extra": (
        {f"block{i:02}.weight": np.ones(1, "f4") for i in range(60)},
        ["not in the network (60)", "block07", "... and 52 more", "All of the network is there"],
    ),
}


@pytest.mark.parametrize(("changes", "texts"), MISMATCHES.values(), ids=MISMATCHES)
def test_mismatch_report(changes, texts, tensors, tmp_path):
    content = {n: x for n, x in (tensors | changes).items() if x is not None}
    path = write(tmp_path / "w", content)
    with pytest.raises(WeightsError) as raised:
        load(path, MODEL)
    message = str(raised.value)
    for text in (str(path), MODEL.name, *texts):
        assert text in message
    assert ('head="fresh"' in message) == ('head="fresh"' in texts)
    assert ("another architecture" in message) == ("another architecture" in texts)


def test_mismatch_report_of_another_architecture_is_short(tensors, tmp_path):
    with pytest.raises(WeightsError, match="0 of the network's 267") as raised:
        load(write(tmp_path / "w", tensors), create("resnet50"))
    assert "It may hold another architecture" in str(raised.value)
    assert len(str(raised.value).splitlines()) < 40


@pytest.mark.parametrize("content", [None, "folder", b"", b"PK\x03\x04 a zip of tensors" * 9])
def test_load_of_unreadable_files(content, tmp_path):
    path = tmp_path / "w"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=str(path)):
        load(path, MODEL)


@pytest.mark.parametrize("kind", ["numpy", "jax", "float16", "bfloat16"])
def test_from_state_dict_takes_arrays_of_any_library(kind, tensors, trees):
    dtypes = {"jax": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
    state = {n: x if kind == "numpy" else jnp.asarray(x, dtypes[kind]) for n, x in tensors.items()}
    loaded = from_state_dict(state | {"bn1.num_batches_tracked": np.array(3)}, MODEL)
    expected = trees
    if kind in ("float16", "bfloat16"):
        expected = jax.tree.map(lambda x: jnp.asarray(x, dtypes[kind]).astype("float32"), trees)
    assert_identical(loaded, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_state_dict_takes_torch_tensors(dtype, tensors, trees):
    torch = pytest.importorskip("torch")
    state = {n: torch.from_numpy(x).to(getattr(torch, dtype)) for n, x in tensors.items()}
    state["conv1.weight"] = torch.nn.Parameter(state["conv1.weight"])
    with pytest.warns(UserWarning, match="Removed 'module.' from each name in the state dict"):
        loaded = from_state_dict({f"module.{n}": x for n, x in state.items()}, MODEL)
    expected = jax.tree.map(lambda x: jnp.asarray(x, dtype).astype("float32"), trees)
    assert_identical(loaded, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1.bias": None}, r"missing \(1\):\n    bn1.bias"),
        ({"neck.bias": np.ones(3, "f4")}, r"not in the network \(1\):\n    neck.bias"),
        ({"bn1.bias": np.ones(3, "f4")}, r"bn1.bias \[3\], not \[16\]"),
        ({"bn1.bias": np.ones(16, "c8")}, "of a type that is not F16, .*\n    bn1.bias complex64"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_from_state_dict_is_strict_in_both_directions(changes, message, tensors):
    state = {n: x for n, x in (tensors | changes).items() if x is not None}
    with pytest.raises(WeightsError, match=f"the state dict does not fit (?s:.*){message}"):
        from_state_dict(state, MODEL)


@pytest.mark.parametrize("state", [{}, {"a": 1}, {3: np.ones(3)}, [np.ones(3)], None])
def test_from_state_dict_refuses_other_values(state):
    with pytest.raises(WeightsError, match="the state dict"):
        from_state_dict(state, MODEL)


def test_load_refuses_an_unknown_head_option(tmp_path):
    with pytest.raises(WeightsError, match="'new'"):
        load(tmp_path / "w", MODEL, head="new")


def test_load_refuses_weights_that_are_not_a_path():
    with pytest.raises(WeightsError, match="weights are None; they must be named by a path"):
        load(None, MODEL)


def test_from_state_dict_takes_any_byte_order_and_nested_dicts(tensors, trees):
    state = {name: x.astype(">f4") for name, x in tensors.items()}
    assert_identical(from_state_dict(state, MODEL), trees)
    with pytest.warns(UserWarning, match="Used 'state_dict' of the state dict, which also holds"):
        loaded = from_state_dict({"state_dict": tensors, "epoch": 3}, MODEL)
    assert_identical(loaded, trees)


def test_from_state_dict_names_a_tensor_that_cannot_be_read(tensors):
    class Sparse:
        shape, dtype = (16,), np.dtype("f4")

        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert a sparse tensor. Use to_dense() first.")

    with pytest.raises(WeightsError, match=r"bn1.bias of the state dict cannot be read: can't .*"):
        from_state_dict(tensors | {"bn1.bias": Sparse()}, MODEL)


def test_load_of_two_networks_requires_a_prefix(tensors, tmp_path):
    state = {f"{side}.{name}": x for side in "ab" for name, x in tensors.items()}
    with pytest.raises(WeightsError, match=r"'b\.' .*Pass the tensors of one of them alone"):
        from_state_dict(state, MODEL)
    save_file(state, tmp_path / "w")
    with pytest.raises(WeightsError, match=r"'b\.' .*Choose one: .*w#prefix=[ab]\."):
        load(tmp_path / "w", MODEL)


def test_mismatch_report_of_quantised_weights(tensors):
    state = {name: x.astype("i1") for name, x in tensors.items()}
    with pytest.raises(WeightsError, match="Quantised or other special weights") as raised:
        from_state_dict(state, MODEL)
    assert "architecture" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs the shared ImageNet weights")
def test_load_of_imagenet_weights(tmp_path):
    tool = SHARED / "tools" / "expand_resnet50.py"
    spec = importlib.util.spec_from_file_location("expand_resnet50", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(SHARED / "weights" / "resnet50_imagenet_int8.npz") as packed:
        state = module.expand(packed)
    path = write(tmp_path / "resnet50.safetensors", state)
    params, stats = load(path, create("resnet50", stride_in_1x1=True))
    np.testing.assert_array_equal(params["fc"]["kernel"], state["fc.weight"].T)
    variance = state["layer4.0.downsample.1.running_var"]
    np.testing.assert_array_equal(stats["layer4"]["0"]["downsample"]["1"]["var"], variance)
    with pytest.raises(WeightsError, match="does not fit resnet18"):
        load(path, create("resnet18"))
