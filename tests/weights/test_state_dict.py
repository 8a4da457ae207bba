"""State dicts in checkpoints: which one is used, its names, and the remarks."""

from pathlib import Path

import numpy as np
import pytest
from make_torch_file import whole, write_zip

from jaxft.errors import WeightsError
from jaxft.weights.state_dict import unwrap
from jaxft.weights.tensors import LazyTensor
from jaxft.weights.torch_format.torch_file import open_torch
from jaxft.weights.torch_format.torch_pickle import OpaqueObject

SHARED = Path(__file__).parents[2].parent / "shared"


def tensor(mark: str = "") -> LazyTensor:
    """Returns a tensor whose shape identifies it."""
    return LazyTensor((len(mark),), "F32", lambda: np.zeros(len(mark), "f4"))


def state(mark: str = "", prefix: str = "", size: int = 3) -> dict[str, LazyTensor]:
    return {f"{prefix}{n}": tensor(mark) for n in ("conv1.weight", "bn1.weight", "fc.bias")[:size]}


PLAIN = ["bn1.weight", "conv1.weight", "fc.bias"]
CYCLE: dict = {"epoch": 3, "state_dict": state("x")}
CYCLE["self"] = CYCLE
COUNTED = state("x", "module.") | {"n_averaged": tensor()}

# (content, remarks). The expected tensors are marked with an x.
USED = {
    "plain": (state("x"), []),
    "state_dict": (
        {"epoch": 3, "state_dict": state("x"), "optimizer": {"state": {0: {"avg": tensor()}}}},
        ["used 'state_dict' of F, which also holds 'epoch', 'optimizer'"],
    ),
    "alone": ({"state_dict": state("x")}, ["used 'state_dict' of F"]),
    "averaged first": (
        {"model": state(), "model_ema": state("x"), "optimizer": {}},
        ["used 'model_ema' of F, which also holds 'model', 'optimizer'"],
    ),
    "averaged, empty": (
        {"ema": {"decay": 0.9}, "model": state("x")},
        ["used 'model' of F, which also holds 'ema'"],
    ),
    "state_dict before model": (
        {"model": state(), "state_dict": state("x")},
        ["used 'state_dict' of F, which also holds 'model'"],
    ),
    "unknown name": (
        {"generator": state("x"), "args": OpaqueObject("argparse.Namespace")},
        ["used 'generator' of F, which also holds 'args'"],
    ),
    "next to an accuracy": (
        {"best": tensor(), "encoder": state("x")},
        ["used 'encoder' of F, which also holds 'best'"],
    ),
    "with an extra state": (
        state("x") | {"fc._extra_state": {"scale": tensor()}},
        ["ignored values of F that are not tensors: 'fc._extra_state' (a dict)"],
    ),
    "nested": (
        {"model": {"state_dict": state("x"), "step": 3}, "lr": 0.1},
        ["used 'model.state_dict' of F, which also holds 'lr', 'model.step'"],
    ),
    "shadow": (
        {"ema": {"updates": tensor(), "shadow": state("x")}},
        ["used 'ema.shadow' of F, which also holds 'ema.updates'"],
    ),
    "holds itself": (CYCLE, ["used 'state_dict' of F, which also holds 'epoch', 'self'"]),
    "no tensors": (
        state("x") | {"epoch": 3, 7: None},
        ["ignored values of F that are not tensors: 'epoch' (an int), '7' (a NoneType)"],
    ),
    "many others": (
        {"net": state("x")} | {f"k{i}": i for i in range(10)},
        [
            "used 'net' of F, which also holds 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', "
            "... and 2 more"
        ],
    ),
    "module": (state("x", "module."), ["removed 'module.' from each name in F"]),
    "wrapped twice": (
        state("x", "_orig_mod.module."),
        ["removed '_orig_mod.module.' from each name in F"],
    ),
    "compiled within": (
        {"conv1._orig_mod.weight": tensor("x"), "bn1.weight": tensor("x"), "fc.bias": tensor("x")},
        ["removed '_orig_mod' from 1 names in F"],
    ),
    "wrapped around and within": (
        {
            "module.conv1._fsdp_wrapped_module._checkpoint_wrapped_module.weight": tensor("x"),
            "module.bn1._fsdp_wrapped_module.weight": tensor("x"),
            "module.fc.bias": tensor("x"),
        },
        [
            "removed '_fsdp_wrapped_module', '_checkpoint_wrapped_module' from 2 names in F",
            "removed 'module.' from each name in F",
        ],
    ),
    "backbone": (state("x", "backbone."), ["removed 'backbone.' from each name in F"]),
    "counter": (
        COUNTED,
        [
            "ignored 'n_averaged' of F, the number of averaged steps",
            "removed 'module.' from each name in F",
        ],
    ),
    "counted copy": (
        {"model": state(), "model_ema": COUNTED},
        [
            "used 'model_ema' of F, which also holds 'model'",
            "ignored 'n_averaged' of F, the number of averaged steps",
            "removed 'module.' from each name in F",
        ],
    ),
}


@pytest.mark.parametrize(("content", "expected"), USED.values(), ids=USED)
def test_unwrap_finds_the_state_dict(content, expected):
    tensors, remarks = unwrap(content, "F")
    assert sorted(tensors) == PLAIN
    assert {x.shape for x in tensors.values()} == {(1,)}
    assert remarks == expected


NAMES = {
    "a layer alone": (["fc.weight", "fc.bias"], ["fc.weight", "fc.bias"]),
    "a wrapped layer": (["module.fc.weight", "module.fc.bias"], ["fc.weight", "fc.bias"]),
    "a wrapped layer itself": (["module.weight", "module.bias"], ["weight", "bias"]),
    "bare": (["weight", "bias"], ["weight", "bias"]),
    "not shared": (["model.a.b", "model.c", "head.d"], ["model.a.b", "model.c", "head.d"]),
    "a token": (["vit.cls", "vit.conv.weight"], ["cls", "conv.weight"]),
    "a name that is the prefix": (["model", "model.a.b"], ["model", "model.a.b"]),
    "a longer name": (["module.a.b", "modules.a.b"], ["module.a.b", "modules.a.b"]),
    "counter without module": (["n_averaged", "a.b"], ["n_averaged", "a.b"]),
}


@pytest.mark.parametrize(("names", "expected"), NAMES.values(), ids=NAMES)
def test_unwrap_removes_the_common_prefix(names, expected):
    tensors, remarks = unwrap({name: tensor() for name in names}, "F")
    assert list(tensors) == expected
    assert bool(remarks) == (names != expected)


CHECKPOINT = {
    "model": {"teacher": state("x"), "student": state()},
    "ema": state(),
    "step": 3,
    "deep": {"er": {"net": state("x")}},
}


@pytest.mark.parametrize("entry", ["model.teacher", "deep.er.net", "deep", "deep.er"])
def test_unwrap_of_an_entry(entry):
    tensors, remarks = unwrap(CHECKPOINT, "F", entry)
    assert sorted(tensors) == PLAIN
    assert {x.shape for x in tensors.values()} == {(1,)}
    assert remarks[0].startswith(f"used '{entry}")


# (content, entry, texts in the error).
REFUSED = {
    "list": ([tensor()], None, ["F holds a list, not a state dict"]),
    "module": (OpaqueObject("argparse.Namespace"), None, ["F holds an argparse.Namespace"]),
    "tensor": (tensor(), None, ["F holds a tensor"]),
    "empty": ({}, None, ["no state dict", "It is empty"]),
    "no tensors": ({"a": 1, "b": {}}, None, ["It holds 'a' (an int), 'b' (an empty dict)"]),
    "optimizer alone": (
        {"optimizer": {"state": {0: {"avg": tensor()}}, "param_groups": []}},
        None,
        ["no state dict", "'optimizer' (a dict)"],
    ),
    "numbered": ({0: tensor(), 1: tensor()}, None, ["names are not strings: '0', '1'"]),
    "counter alone": ({"n_averaged": tensor()}, None, ["no tensor except 'n_averaged'"]),
    "several": (
        {"student": state(), "teacher": state(size=2)},
        None,
        ["several", "'student' (3 tensors), 'teacher' (2 tensors)", "F#entry=student"],
    ),
    "several below": (CHECKPOINT, "model", ["'model.teacher' (3 tensors)", "'model.student'"]),
    "no such entry": (CHECKPOINT, "net", ["'net'", "'ema' (3 tensors)", "'deep.er.net'"]),
    "entry without tensors": (CHECKPOINT, "step", ["no state dict as its entry 'step'"]),
    "entry of a plain one": (state(), "net", ["'net'", "There is none."]),
}


@pytest.mark.parametrize(("content", "entry", "texts"), REFUSED.values(), ids=REFUSED)
def test_unwrap_errors(content, entry, texts):
    with pytest.raises(WeightsError) as raised:
        unwrap(content, "F", entry)
    for text in texts:
        assert text in str(raised.value)


def test_unwrap_of_a_torch_file(tmp_path):
    data = np.arange(6, dtype="f4").reshape(2, 3)
    content = {"net": {"module.fc.weight": whole("FloatStorage", data)}, "epoch": 1}
    tensors, _ = unwrap(open_torch(write_zip(tmp_path / "w", content)), "w")
    np.testing.assert_array_equal(tensors["fc.weight"].read(), data)


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs the shared CIFAR-10 weights")
def test_unwrap_of_a_cifar_10_checkpoint():
    path = SHARED / "weights" / "resnet20_cifar10.th"
    tensors, remarks = unwrap(open_torch(path), path.name)
    assert remarks == [
        "used 'state_dict' of resnet20_cifar10.th, which also holds 'best_prec1'",
        "removed 'module.' from each name in resnet20_cifar10.th",
    ]
    assert tensors["layer3.2.conv2.weight"].shape == (64, 64, 3, 3)
    assert tensors["linear.bias"].read().shape == (10,)
