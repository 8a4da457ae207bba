"""Pickles of tensors and containers are read; anything else is refused and not run."""

import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from make_torch_file import Call, Code, Global, Pickler, Storage, rebuild, whole, write, write_zip

from jaxft.errors import WeightsError
from jaxft.weights.torch_format.torch_file import open_torch
from jaxft.weights.torch_format.torch_pickle import OpaqueObject

FORMS = ("zip", "legacy")
VALUES = np.arange(24, dtype="f4")
BASE = Storage("FloatStorage", VALUES)


def error_of(path: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        open_torch(path)
    return str(raised.value)


PARAMETER = Global("torch._utils", "_rebuild_parameter")
ORDERED = Global("collections", "OrderedDict")
# Other values in checkpoints, and the values that are read.
OTHER_VALUES = {
    "constants": ([None, True, False, -3, 2**70, 0.5, "é", b"\0"],) * 2,
    "ordered dict of Python 2": (Call(ORDERED, ([["a", 1], ["b", 2]],)), {"a": 1, "b": 2}),
    "state dict": (Call(ORDERED, (), {"_metadata": {}}), {}),
    "defaultdict": (
        Call(Global("collections", "defaultdict"), (Global("builtins", "list"),)),
        {},
    ),
    "counter": (Call(Global("collections", "Counter"), ({30: 1},)), {30: 1}),
    "set": (Call(Global("__builtin__", "set"), ([1, 2],)), [1, 2]),
    "size": (Call(Global("torch", "Size"), ((2, 3),)), (2, 3)),
    "device": (Call(Global("torch", "device"), ("cuda", 0)), OpaqueObject("torch.device")),
    "namespace": (
        Call(Global("argparse", "Namespace"), (), {"lr": 0.1}, opcode=b"\x81"),
        OpaqueObject("argparse.Namespace", {"lr": 0.1}),
    ),
    "numpy scalar": (
        Call(Global("numpy._core.multiarray", "scalar"), (None, b"\0" * 8)),
        OpaqueObject("numpy.core.multiarray.scalar"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("saved", "expected"), OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_unpickle_other_values(form, saved, expected, tmp_path):
    parameter = Call(PARAMETER, (whole("FloatStorage", VALUES), True, Call(ORDERED)))
    opened = open_torch(write(tmp_path / "w", {"x": saved, "weight": parameter}, form))
    assert opened["x"] == expected
    np.testing.assert_array_equal(opened["weight"].read(), VALUES)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unpickle_protocols(protocol, tmp_path):
    content = {"a": [1, (2.5, "é" * 300, None), ((), (1,), (1, 2), [])], -7: {"b": b"x" * 300}}
    content["again"] = content["a"]
    if protocol > 2:
        content |= {"set": {5}, "frozen": frozenset([5])}
    data = pickle.dumps(content, protocol)
    path = write_zip(tmp_path / "w", None, more={"archive/data.pkl": data})
    opened = open_torch(path)
    expected = {"set": [5], "frozen": [5]} if protocol > 2 else {}
    if protocol == 2:
        assert opened[-7]["b"] == OpaqueObject("_codecs.encode")
        opened[-7] = content[-7]
    assert opened == content | expected
    assert opened["again"] is opened["a"]


def short_unicode(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


SYSTEM = Global("os", "system")
CALLED = Call(Global("torch", "device"))
# Pickles with more than data, and a text in the error.
HOSTILE = {
    "os.system": (Call(SYSTEM, ("touch ran",)), "asks for os.system"),
    "posix": (Call(Global("posix", "system"), ("touch ran",)), "asks for posix.system"),
    "nt": (Call(Global("nt", "system"), ("touch ran",)), "asks for nt.system"),
    "eval": (Call(Global("builtins", "eval"), ("open('ran', 'w')",)), "asks for builtins.eval"),
    "eval of 2": (Call(Global("__builtin__", "eval"), ("0",)), "asks for builtins.eval"),
    "getattr": (Call(Global("builtins", "getattr"), ({}, "pop")), "asks for builtins.getattr"),
    "open": (Call(Global("io", "open"), ("ran", "w")), "asks for io.open"),
    "escapes": (Global("os", "\x1b[2J"), "asks for os.?[2J"),
    "named alone": (SYSTEM, "asks for os.system"),
    "torch.load": (Call(Global("torch", "load"), ("ran",)), "asks for torch.load"),
    "module": (
        Call(Global("torchvision.models.resnet", "ResNet"), (), {"a": 1}, b"\x81"),
        "asks for torchvision.models.resnet.ResNet",
    ),
    "dotted": (
        Code(short_unicode("torch") + short_unicode("storage.os.system") + b"\x93"),
        "asks for torch.storage.os.system",
    ),
    "dunder": (
        Code(short_unicode("argparse") + short_unicode("Namespace.__init__") + b"\x93"),
        "asks for argparse.Namespace.__init__",
    ),
    "complex": (
        Call(Global("torch", "ComplexFloatStorage")),
        "asks for torch.ComplexFloatStorage",
    ),
    "quantised": (
        Call(Global("torch._utils", "_rebuild_qtensor")),
        "asks for torch._utils._rebuild_qtensor",
    ),
    "inst": (Code(b"(ios\nsystem\n"), "INST"),
    "obj": (Code(b"(cargparse\nNamespace\no"), "OBJ"),
    "extension": (Code(b"\x82\x01"), "EXT1"),
    "newobj_ex": (Code(b"cargparse\nNamespace\n)}\x92"), "NEWOBJ_EX"),
    "text reference": (Code(b"Pstorage\n"), "PERSID"),
    "bytearray": (Code(b"\x96" + struct.pack("<Q", 2**50)), "damaged"),
    "call of a result": (Call(CALLED, ()), "damaged"),
    "call of a string": (Call("os.system", ()), "damaged"),
    "state of a tuple": (Code(b")}b"), "damaged"),
    "state of a list": (Code(b"]}b"), "damaged"),
    "appended to a device": (Code(Pickler(False).code(CALLED) + b"Na"), "damaged"),
    "item of a list": (Code(b"]NNs"), "damaged"),
    "list as key": (Code(b"}]Ns"), "key that is a list"),
    "tensor of a string": (Call(rebuild(2), ("os", 0, (), (), False, None)), "damaged"),
    "too few arguments": (Call(rebuild(2), ("os",)), "damaged"),
    "negated": (
        Call(rebuild(2), (BASE, 0, (1,), (1,), False, None, {"neg": True})),
        "pending negation or conjugation",
    ),
    "reference to nothing": (Code(b"NQ"), "damaged"),
    "reference to a module": (Code(Pickler(False).code(("module", 0, 0, 0, 0)) + b"Q"), "damaged"),
    "memo that is not there": (Code(b"h\x05"), "damaged"),
    "memo far away": (Code(b"Nr\xff\xff\xff\xff0h\x05"), "damaged"),
    "string of 2 GiB": (Code(b"X\xff\xff\xff\x7f"), "damaged"),
    "string of 8 EiB": (Code(b"\x8d" + b"\xff" * 7 + b"\x7f"), "damaged"),
    "frame of 8 EiB": (Code(b"\x95" + b"\xff" * 7 + b"\x7f"), "damaged"),
    "mark alone": (Code(b"t"), "damaged"),
    "empty stack": (Code(b"0"), "damaged"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("content", "text"), HOSTILE.values(), ids=HOSTILE)
def test_unpickle_refuses_hostile_pickles(form, content, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(write(tmp_path / "w", content, form))
    assert text in message
    if text.startswith("asks for"):
        assert "nothing was run" in message
        assert "load it in torch" in message
    assert os.listdir(tmp_path) == ["w"]


class Touch:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_unpickle_does_not_run_reduce(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"state_dict": Touch()}, protocol)
    (tmp_path / "bare").write_bytes(data)
    write_zip(tmp_path / "zip", None, more={"archive/data.pkl": data})
    for name in ("bare", "zip"):
        assert f"asks for {os.mkdir.__module__}.mkdir" in error_of(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["bare", "zip"]


@pytest.mark.slow
def test_unpickle_of_bombs_takes_no_memory(tmp_path):
    doubled = b"]q\x00" + b"".join(b"](h\0h\0eq\x00" for _ in range(200))  # 2 ** 200 lists
    keys = b"(K\x01K\x02tq\x00" + b"(h\0h\0tq\x00" * 60  # hashing it would take forever
    text = "x" * 100_000
    copies = b"X" + struct.pack("<I", len(text)) + text.encode() + b"q\x010"
    copies += b"c_codecs\nencode\nq\x020](" + b"h\x02h\x01\x85R" * 20_000 + b"e"  # 2 GB of bytes
    pairs = b"](" + b"](K\x01K\x02e" * 10_000 + b"eq\x010ccollections\nOrderedDict\nq\x020"
    pairs += b"](" + b"h\x02h\x01\x85R" * 10_000 + b"e"
    tracemalloc.start()
    for i, code in enumerate([doubled, copies, pairs, b"Nr\xff\xff\xff\x0f"]):
        open_torch(write(tmp_path / f"{i}", Code(code), "zip"))
    assert "key that is a tuple" in error_of(
        write(tmp_path / "w", Code(b"}" + keys + b"Ns"), "zip")
    )
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()
