"""Files of torch.save are read bit for bit; any other file gives one clear error."""

import gzip
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from make_torch_file import (
    Call,
    Code,
    Global,
    Pickler,
    Storage,
    Tensor,
    whole,
    write,
    write_legacy,
    write_zip,
)

from jaxft.errors import WeightsError
from jaxft.weights.tensors import LazyTensor
from jaxft.weights.torch_format.torch_file import open_torch

SHARED = Path(__file__).parents[2].parent / "shared"
FORMS = ("zip", "legacy")
VALUES = np.arange(24, dtype="f4")
BASE = Storage("FloatStorage", VALUES)


def tensors_in(content) -> list[LazyTensor]:
    if isinstance(content, LazyTensor):
        return [content]
    children = content.values() if isinstance(content, dict) else content
    return [t for x in children for t in tensors_in(x)] if isinstance(content, dict | list) else []


def read_all(path: Path) -> None:
    for tensor in tensors_in(open_torch(path)):
        tensor.read()


def error_of(path: Path) -> str:
    """Returns the error of opening a file or reading its tensors."""
    with pytest.raises(WeightsError) as raised:
        read_all(path)
    message = str(raised.value)
    assert message.count(str(path)) == 1
    return message.replace(str(path), "FILE")


KINDS = {
    "Double": ("F64", "f8"),
    "Float": ("F32", "f4"),
    "Half": ("F16", "f2"),
    "BFloat16": ("BF16", ml_dtypes.bfloat16),
    "Long": ("I64", "i8"),
    "Int": ("I32", "i4"),
    "Short": ("I16", "i2"),
    "Char": ("I8", "i1"),
    "Byte": ("U8", "u1"),
    "Bool": ("BOOL", "?"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "name", "dtype"), [(k, *v) for k, v in KINDS.items()])
def test_open_torch_dtypes(form, kind, name, dtype, tmp_path):
    data = np.array([[0, 1, 2], [3, 0, 5]]).astype(dtype)
    tensor = open_torch(write(tmp_path / "w", whole(f"{kind}Storage", data), form))
    assert (tensor.shape, tensor.dtype) == ((2, 3), name)
    array = tensor.read()
    assert array.dtype == data.dtype
    np.testing.assert_array_equal(array, data)
    assert array.flags.owndata
    assert array.flags.c_contiguous
    array[:] = 0
    np.testing.assert_array_equal(tensor.read(), data)


# (size, stride, offset) in a storage of 0, 1, ... 23, and the expected view.
VIEWS = {
    "transposed": ((6, 4), (1, 6), 0, VALUES.reshape(4, 6).T),
    "sliced": ((2, 3), (12, 2), 1, VALUES.reshape(4, 6)[::2, 1::2]),
    "expanded": ((3, 2), (0, 1), 4, np.array([[4, 5]] * 3)),
    "overlapping": ((3, 3), (1, 1), 0, np.array([[0, 1, 2], [1, 2, 3], [2, 3, 4]])),
    "scalar": ((), (), 23, np.array(23)),
    "empty": ((0, 3), (3, 1), 24, np.zeros((0, 3))),
    "all": ((24,), (1,), 0, VALUES),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", [1, 2])
def test_open_torch_views_of_one_storage(form, version, tmp_path):
    content = {n: Tensor(BASE, *view, version) for n, (*view, _) in VIEWS.items()}
    opened = open_torch(write(tmp_path / "w", content, form))
    for name, (size, _, _, expected) in VIEWS.items():
        assert opened[name].shape == size
        np.testing.assert_array_equal(opened[name].read(), expected, strict=False)
        assert opened[name].read().shape == size


# (size, stride, offset) of invalid views of a storage of 24 elements.
OUTSIDE = {
    "longer": ((25,), (1,), 0),
    "later": ((24,), (1,), 1),
    "far": ((1,), (1,), 24),
    "steeper": ((4, 6), (7, 1), 0),
    "before": ((2,), (1,), -1),
    "backwards": ((2,), (-1,), 3),
    "negative": ((-2,), (1,), 0),
    "of other rank": ((2, 2), (1,), 0),
    "float": ((2.0,), (1,), 0),
    "bool": ((True,), (1,), 0),
    "overflow": ((2**40, 2**40), (2**40, 2**40), 0),
    "repeated forever": ((2**30, 2**20), (0, 0), 0),
    "empty and huge": ((0, 2**59, 2**59), (0, 0, 0), 0),
    "of rank 65": ((1,) * 65, (1,) * 65, 0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", OUTSIDE.values(), ids=OUTSIDE)
def test_open_torch_refuses_views_outside_their_storage(form, view, tmp_path):
    error_of(write(tmp_path / "w", [Tensor(BASE, *view)], form))


def test_open_torch_storage_that_is_a_part_of_another(tmp_path):
    part = Storage("FloatStorage", VALUES, view=("1", 4, 6))
    path = write_legacy(tmp_path / "w", Tensor(part, (2, 3), (3, 1)))
    np.testing.assert_array_equal(open_torch(path).read(), VALUES[4:10].reshape(2, 3))
    assert "reaches beyond" in error_of(write_legacy(path, [Tensor(part, (7,), (1,))]))
    part = Storage("FloatStorage", VALUES, view=("1", 20, 6))
    assert "reaches beyond" in error_of(write_legacy(path, [Tensor(part, (1,), (1,))]))


def test_open_torch_big_endian(tmp_path):
    data = VALUES.astype(">f4")
    more = {"archive/byteorder": b"big"}
    path = write_zip(tmp_path / "w", whole("FloatStorage", data), more=more)
    np.testing.assert_array_equal(open_torch(path).read(), VALUES)
    assert open_torch(path).read().dtype == np.dtype("=f4")
    path = write_zip(tmp_path / "w", [BASE], more={"archive/byteorder": b"middle"})
    assert "byte order is 'middle'" in error_of(path)


def test_open_torch_refuses_zip_bombs(tmp_path):
    data = np.zeros(6 << 20, "f4")
    path = write_zip(tmp_path / "w", whole("FloatStorage", data), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "zip bomb: archive/data/0 would grow" in error_of(path)
    data = pickle.dumps("x" * (65 << 20))
    path = write_zip(path, None, zipfile.ZIP_DEFLATED, {"archive/data.pkl": data})
    assert "data.pkl of 68,1" in error_of(path)
    path = write_zip(path, whole("FloatStorage", VALUES), zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(open_torch(path).read(), VALUES)
    path = write_zip(path, whole("FloatStorage", VALUES), zipfile.ZIP_BZIP2)
    assert "has a compression that torch never uses" in error_of(path)


def make_zip(tmp_path: Path, names: list[str]) -> bytes:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"N.")
    return (tmp_path / "archive.zip").read_bytes()


TAR = b"pickle".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")
OTHER_FILES = {
    "nothing": (b"", "is empty"),
    "web page": (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "looks like a web page"),
    "text": (b"weights", "neither a file of torch.save"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "tar": (TAR, "torch before 0.1.10"),
    "gzip": (gzip.compress(b"x"), "neither a file of torch.save"),
    "list": (pickle.dumps([1, 2]), "is a pickle, but not of torch.save"),
    "number": (pickle.dumps(3), "is a pickle, but not of torch.save"),
    "other protocol": (pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(7), "another protocol"),
    "no zip": (b"PK\x03\x04 a zip of tensors" * 9, "damaged"),
    "arrays": (["a.npy", "b.npy"], "no data.pkl. It holds 'a.npy', 'b.npy'"),
    "script": (["m/data.pkl", "m/constants.pkl", "m/code/a.py"], "TorchScript"),
}


@pytest.mark.parametrize(("content", "text"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_open_torch_identifies_other_files(content, text, tmp_path):
    content = make_zip(tmp_path, content) if isinstance(content, list) else content
    (tmp_path / "w").write_bytes(content)
    assert text in error_of(tmp_path / "w")


def test_open_torch_of_a_missing_file(tmp_path):
    assert error_of(tmp_path) == "FILE is a folder, not a file"
    assert error_of(tmp_path / "w") == "FILE is missing"


def test_open_torch_refuses_inconsistent_storages(tmp_path):
    content = [whole("FloatStorage", VALUES)]
    path = write_zip(tmp_path / "w", content, more={"archive/data/0": b"1234"})
    assert "data/0 is 4 bytes, not 96" in error_of(path)
    other = Storage("IntStorage", VALUES.astype("i4"))
    assert "is of two types" in error_of(write_legacy(path, [BASE, other]))
    missing = Code(Pickler(False).code(whole("FloatStorage", VALUES, key="../../0")))
    assert "lacks its tensor data/../../0" in error_of(write_zip(path, missing))


@pytest.mark.parametrize("form", FORMS)
def test_open_torch_reads_tensors_lazily(form, tmp_path):
    content = {
        "good": whole("FloatStorage", VALUES, "0"),
        "bad": whole("FloatStorage", VALUES + 24, "1"),
    }
    path = write(tmp_path / "w", content, form)
    data, bad = path.read_bytes(), (VALUES + 24).tobytes()
    assert data.count(bad) == 1
    path.write_bytes(data.replace(bad, bytes(len(bad))))
    opened = open_torch(path)
    np.testing.assert_array_equal(opened["good"].read(), VALUES)
    if form == "zip":  # the legacy format has no checksum
        with pytest.raises(WeightsError, match=rf"{path} is damaged.*CRC"):
            opened["bad"].read()
    else:
        path.write_bytes(data[:-1])
        with pytest.raises(WeightsError, match=rf"{path} is damaged or cut short"):
            opened["bad"].read()


def test_open_torch_takes_no_memory_for_tensors(tmp_path):
    for form in FORMS:
        path = write(tmp_path / "w", whole("FloatStorage", np.zeros(4 << 20, "f4")), form)
        tracemalloc.start()
        tensor = open_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert tensor.shape == (4 << 20,)


@pytest.mark.parametrize("form", FORMS)
def test_open_torch_damage_is_one_error(form, tmp_path):
    """Damaged values may give no error."""
    content = {
        "epoch": 3,
        "args": Call(Global("argparse", "Namespace"), (), {"lr": 0.1}),
        "state_dict": {
            "a": Tensor(BASE, (4, 6), (6, 1)),
            "b": whole("LongStorage", np.arange(5), "1"),
        },
    }
    path = write(tmp_path / "w", content, form)
    data = path.read_bytes()
    for size in range(len(data)):
        if size % 7 == 0 or form == "legacy":
            path.write_bytes(data[:size])
            error_of(path)
    rng = random.Random(0)
    messages = []
    for _ in range(800):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except WeightsError as error:
            messages.append(str(error))
    assert all(str(path) in message and len(message) < 1000 for message in messages)
    assert len(messages) > 300


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs the shared CIFAR-10 weights")
def test_open_torch_of_a_cifar_10_checkpoint():
    opened = open_torch(SHARED / "weights" / "resnet20_cifar10.th")
    assert opened["best_prec1"] == pytest.approx(91.78)
    state = opened["state_dict"]
    assert state["module.conv1.weight"].shape == (16, 3, 3, 3)
    assert sum(tensor.read().size for tensor in state.values()) > 270_000
    assert all((x.read() > 0).all() for n, x in state.items() if n.endswith("running_var"))


@pytest.mark.parametrize("new", [True, False], ids=FORMS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_open_torch_of_files_that_torch_writes(new, protocol, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    dtypes = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
    content = {str(dtype): base.to(dtype) for dtype in dtypes} | {
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": base[0].expand(3, 6),
        "scalar": base[2, 3],
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base),
        "subnormal": torch.tensor([1e-40, float("nan"), float("-inf")]),
    }
    tagged = torch.ones(3)
    tagged.tag = "kept as an attribute"
    content["tagged"] = tagged
    optimizer = torch.optim.AdamW([content["parameter"]])
    path = tmp_path / "w"
    saved = {"state_dict": content, "optimizer": optimizer.state_dict(), "best": np.float64(3)}
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    opened = open_torch(path)
    assert opened["optimizer"] == optimizer.state_dict()
    for name, expected in content.items():
        array = opened["state_dict"][name].read()
        assert array.shape == expected.shape
        actual = torch.from_numpy(array.view("i2") if "bfloat16" in name else array)
        actual = actual.view(torch.bfloat16) if "bfloat16" in name else actual
        assert torch.equal(actual.view(-1).isnan(), expected.reshape(-1).isnan())
        assert torch.equal(actual.nan_to_num(), expected.detach().nan_to_num())


def test_open_torch_refuses_a_whole_module(tmp_path):
    torch = pytest.importorskip("torch")
    for new in (True, False):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "w", _use_new_zipfile_serialization=new)
        assert "asks for torch.nn.modules.linear.Linear" in error_of(tmp_path / "w")
