"""Reads the pickle inside a file of `torch.save`: tensors and containers, and nothing else.

Not by a subclass of Python's own unpickler, which sets attributes where the pickle says so, and
sets aside as much memory as a memo's index asks for. Here an opcode that is not in the list, or
a name that is not, ends it, and the names that are in it stand for functions of ours.
"""

import math
import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np

from jaxft.errors import WeightsError
from jaxft.weights.tensors import DTYPES, LazyTensor

# What no real file comes near, and a hostile one cannot pass to exhaust the memory.
PICKLE_BYTES = 64 << 20
_STEPS = 4_000_000
_REPEATED_BYTES = 64 << 20
_RANK = 64  # of torch's tensors, and of numpy's arrays
_KEY_LENGTH = 8  # of a tuple that is a key

WAY_OUT = (
    "If you trust the file, load it in torch and save only its tensors: "
    "safetensors.torch.save_model(model, 'model.safetensors')."
)


@dataclass(frozen=True)
class Storage:
    """What tensors are views of. Lengths count elements."""

    dtype: str
    first: int
    numel: int
    order: str
    """`little` or `big`."""
    fetch: Callable[[int, int], bytes]
    """All the bytes from one to another."""


@dataclass
class Inert:
    """Stands for a value that is neither a tensor nor a container; it does nothing."""

    kind: str
    """`argparse.Namespace`."""
    state: Any = None
    """Its attributes, where the file sets any."""


@dataclass(frozen=True)
class _Global:
    name: str
    make: Callable[..., Any]


def unpickle(file: IO[bytes], storage: Callable[[Any], Storage]) -> Any:
    """The next pickle's object; the file is left where it ends.

    storage: from what the pickle calls a persistent id.

    Raises:
      WeightsError: the pickle asks for more than tensors and containers. It does not name the file.
      Exception: any other, where the pickle is damaged.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stack below each mark
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    arg: Any
    for step, (opcode, arg, _) in enumerate(pickletools.genops(cast(IO[bytes], _Bounded(file)))):
        if step > _STEPS:
            raise WeightsError("has a pickle of more steps than any checkpoint's")
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name == "TUPLE":
            items = since_mark()
            stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(items[::-1]))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            _of(list, stack[-1]).extend(items)
        elif name == "FROZENSET":
            items = since_mark()
            stack.append(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else since_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set(stack[-1], key, value)
        elif name == "GLOBAL":
            stack.append(_find(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_find(_of(str, module), _of(str, attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
            else:  # else of a state dict, `_metadata` that no tensor needs
                _of(dict, stack[-1])
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise WeightsError(
                f"has a pickle with {name}, which torch.save never writes. {WAY_OUT}"
            )


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # a set would have to compare its elements
}


class _Bounded:
    """A file for one pickle: nothing is set aside for lengths that the pickle only claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(max(0, min(size, self._left))))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} should be")
    return value


def _set(target: Any, key: Any, value: Any) -> None:
    # Hashing any other key could take forever: tuples of tuples of the same tuple.
    parts = key if type(key) is tuple and len(key) <= _KEY_LENGTH else (key,)
    for part in parts:
        if type(part) not in (str, int, float, bool, bytes, type(None)):
            raise WeightsError(f"has a dict with a key that is a {type(part).__name__}. {WAY_OUT}")
    _of(dict, target)[key] = value


def _find(module: str, attribute: str) -> _Global:
    module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core", "numpy.core")
    name = f"{module}.{attribute}"
    if name not in _GLOBALS:
        raise WeightsError(
            f"asks for {name[:200]}, which is neither a tensor nor a container; nothing was run. "
            + WAY_OUT
        )
    return _Global(name, _GLOBALS[name])


def _call(function: Any, arguments: Any) -> Any:
    return _of(_Global, function).make(*_of(tuple, arguments))


# Tensors.


def parse_storage(identity: Any) -> tuple[str, str, int]:
    """A storage's dtype, key and number of elements, of its persistent id.

    That is `("storage", type, key, device, numel)`.
    """
    mark, kind, key, _, numel = _of(tuple, identity)
    dtype = _STORAGES.get(_of(_Global, kind).name)
    if mark != "storage" or dtype is None or type(key) is not str or not is_count(numel):
        raise ValueError("a storage without a proper name or length")
    return dtype, key, numel


def is_count(value: Any) -> bool:
    """Whether it can be a number of elements."""
    return type(value) is int and 0 <= value < 1 << 60


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor:
    _of(Storage, storage)
    counts = (offset, *_of(tuple, size), *_of(tuple, stride))
    if not (len(size) == len(stride) <= _RANK and all(map(is_count, counts))):
        raise WeightsError(
            f"is damaged: a tensor of shape {_brief(size)}, strides {_brief(stride)}"
        )
    dtype = DTYPES[storage.dtype]
    numel = math.prod(size)
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if numel else 0
    if offset + span > storage.numel or math.prod(n or 1 for n in size) > sys.maxsize // 16:
        raise WeightsError(f"is damaged: a tensor {_brief(size)} reaches beyond its storage")
    if numel > storage.numel and numel * dtype.itemsize > _REPEATED_BYTES:
        raise WeightsError(
            f"repeats {storage.numel:,} elements to a tensor {_brief(size)}: too many"
        )
    start = (storage.first + offset) * dtype.itemsize

    def read() -> np.ndarray:
        flat = np.frombuffer(storage.fetch(start, start + span * dtype.itemsize), dtype)
        if storage.order != sys.byteorder:
            flat = flat.view(f"u{dtype.itemsize}").byteswap().view(dtype)
        if not numel:
            return np.empty(size, dtype)
        strides = [s * dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat, size, strides).copy()

    return LazyTensor(size, storage.dtype, read)


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, bits: Any = None
) -> LazyTensor:
    if bits:
        raise WeightsError(f"holds a tensor to be negated or conjugated when it is read. {WAY_OUT}")
    return _tensor(storage, offset, size, stride)


def _brief(value: Any) -> str:
    return repr(value)[:80]


# What a pickle may name.


def _inert(name: str) -> Callable[..., Inert]:
    return lambda *_: Inert(name)


def _dict(items: Any = ()) -> dict[Any, Any]:
    """A Counter, of a dict, or Python 2's OrderedDict, of a list."""
    if type(items) is dict:
        return items
    made: dict[Any, Any] = {}
    for key, value in items:
        _set(made, key, value)
    if items:
        # The list was made for this. Named again and again, it would be copied as often.
        _of(list, items).clear()
    return made


_KINDS = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
}
_STORAGES = {
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{kind}Storage": dtype for kind, dtype in _KINDS.items()},
    **{f"torch.cuda.{kind}Storage": dtype for kind, dtype in _KINDS.items()},
}
# Options, devices, dtypes, metrics: what checkpoints hold beside their tensors.
_INERT = {
    "_codecs": "encode",
    "argparse": "Namespace",
    "builtins": "bool bytearray complex dict float int list str tuple",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "pathlib": "PosixPath PurePosixPath WindowsPath",
    "torch": "Tensor device float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool",
    "torch.nn.parameter": "Parameter",
    "torch.storage": "TypedStorage",
}
_GLOBALS: dict[str, Callable[..., Any]] = {
    **{name: _inert(name) for name in _STORAGES},
    **{
        f"{m}.{name}": _inert(f"{m}.{name}")
        for m, names in _INERT.items()
        for name in names.split()
    },
    "builtins.frozenset": lambda items=(): items,
    "builtins.set": lambda items=(): items,
    "collections.Counter": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": lambda items=(): items,
    "torch._tensor._rebuild_from_type_v2": lambda function, _kind, args, _state: _call(
        function, args
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
}
