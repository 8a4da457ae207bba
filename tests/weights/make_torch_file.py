"""Writes files of `torch.save` in the zip and legacy formats, opcode by opcode, without torch."""

import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """Call of a function, or of a class by another `opcode`, and the state of the result."""

    function: Any
    arguments: tuple = ()
    state: Any = None
    opcode: bytes = b"R"


@dataclass(frozen=True)
class Code:
    """Literal opcodes."""

    code: bytes


@dataclass(frozen=True, eq=False)
class Storage:
    kind: str
    data: np.ndarray
    key: str = "0"
    view: Any = None


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    size: tuple
    stride: tuple
    offset: int = 0
    version: int = 2


@dataclass
class Pickler:
    """Encodes objects, and collects their storages."""

    legacy: bool
    storages: dict[str, Storage] = field(default_factory=dict)

    def dumps(self, content: Any) -> bytes:
        return b"\x80\x02" + self.code(content) + b"."

    def code(self, x: Any) -> bytes:
        match x:
            case None:
                return b"N"
            case bool():
                return b"\x88" if x else b"\x89"
            case int():
                data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", x)
            case str():
                return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
            case bytes():
                return b"B" + struct.pack("<I", len(x)) + x
            case tuple():
                return b"(" + b"".join(map(self.code, x)) + b"t"
            case list():
                return b"](" + b"".join(map(self.code, x)) + b"e"
            case dict():
                items = b"".join(self.code(k) + self.code(v) for k, v in x.items())
                return b"}(" + items + b"u"
            case Global(module, name):
                return f"c{module}\n{name}\n".encode()
            case Call(function, arguments, state, opcode):
                call = self.code(function) + self.code(arguments) + opcode
                return call if state is None else call + self.code(state) + b"b"
            case Code(code):
                return code
            case Storage(kind, data, key, view):
                self.storages[key] = x
                persistent_id = ("storage", Global("torch", kind), key, "cpu", data.size)
                if self.legacy:
                    persistent_id += (view,)
                return self.code(persistent_id) + b"Q"
            case Tensor(storage, size, stride, offset, 1):
                return self.code(Call(rebuild(1), (storage, offset, size, stride)))
            case Tensor(storage, size, stride, offset, 2):
                hooks = Call(Global("collections", "OrderedDict"))
                arguments = (storage, offset, size, stride, False, hooks)
                return self.code(Call(rebuild(2), arguments))
        raise TypeError(x)


def rebuild(version: int) -> Global:
    return Global("torch._utils", "_rebuild_tensor" + ("_v2" if version == 2 else ""))


def whole(kind: str, data: Any, key: str = "0") -> Tensor:
    """Returns a contiguous tensor that covers its storage."""
    data = np.ascontiguousarray(data)
    stride = tuple(math.prod(data.shape[i + 1 :]) for i in range(data.ndim))
    return Tensor(Storage(kind, data.reshape(-1), key), data.shape, stride)


def write(path: Path, content: Any, form: str) -> Path:
    return {"zip": write_zip, "legacy": write_legacy}[form](path, content)


def write_zip(
    path: Path,
    content: Any,
    compression: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
) -> Path:
    """Writes the zip format; `more` adds or replaces entries."""
    pickler = Pickler(legacy=False)
    entries = {"archive/data.pkl": pickler.dumps(content), "archive/byteorder": b"little"}
    entries |= {f"archive/data/{k}": s.data.tobytes() for k, s in pickler.storages.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (entries | (more or {})).items():
            archive.writestr(name, data)
    return path


def write_legacy(path: Path, content: Any) -> Path:
    pickler = Pickler(legacy=True)
    objects = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content]
    pickles = [pickler.dumps(x) for x in objects]
    keys = sorted(pickler.storages)
    data = [(pickler.storages[k].data.size, pickler.storages[k].data.tobytes()) for k in keys]
    raw = [struct.pack("<q", numel) + values for numel, values in data]
    path.write_bytes(b"".join([*pickles, pickler.dumps(keys), *raw]))
    return path
