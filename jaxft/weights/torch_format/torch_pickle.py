"""Reads the pickle in a file of `torch.save`, restricted to tensors and containers.

A subclass of Python's unpickler would not be safe: a pickle can make it set attributes, and
allocate memory for any memo index. This reader accepts only listed opcodes and listed names, and
each name stands for a function in this module.
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

# Limits that no real file reaches, so that a hostile file cannot exhaust the memory.
MAX_PICKLE_BYTES = 64 << 20
_MAX_OPCODES = 4_000_000
_MAX_EXPANDED_BYTES = 64 << 20
_MAX_RANK = 64  # of torch tensors and NumPy arrays
_MAX_KEY_LENGTH = 8  # of a tuple as a dict key

RESAVE_HINT = (
    "If you trust the file, load it in torch and save only its tensors: "
    "safetensors.torch.save_model(model, 'model.safetensors')."
)


@dataclass(frozen=True)
class Storage:
    """Storage that tensors are views of.

    Attributes:
      dtype: Dtype as safetensors names it.
      first: First element, for a storage that is a part of another.
      numel: Number of elements.
      byte_order: `little` or `big`.
      read_bytes: Returns the bytes from a start to a stop position.
    """

    dtype: str
    first: int
    numel: int
    byte_order: str
    read_bytes: Callable[[int, int], bytes]


@dataclass
class OpaqueObject:
    """Placeholder for an object that is neither a tensor nor a container.

    Attributes:
      type_name: Name of its type, such as `argparse.Namespace`.
      state: Its attributes, if the file sets any.
    """

    type_name: str
    state: Any = None


@dataclass(frozen=True)
class _Global:
    """A name in the pickle, and the function that stands for it."""

    name: str
    function: Callable[..., Any]


def unpickle(file: IO[bytes], load_storage: Callable[[Any], Storage]) -> Any:
    """Reads the next pickle of a file, and leaves the file at its end.

    Args:
      file: Open file.
      load_storage: Returns the storage for a persistent id.

    Raises:
      WeightsError: The pickle contains anything except tensors and containers. The message does not
        name the file.
      Exception: Any other, if the pickle is damaged.
    """
    stack: list[Any] = []
    mark_stack: list[list[Any]] = []  # the stack below each mark
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, mark_stack.pop()
        return items

    arg: Any
    for step, (opcode, arg, _) in enumerate(
        pickletools.genops(cast(IO[bytes], _LimitedFile(file)))
    ):
        if step > _MAX_OPCODES:
            raise WeightsError("has a pickle with more opcodes than any checkpoint needs")
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in _CONSTRUCTORS:
            stack.append(_CONSTRUCTORS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            mark_stack.append(stack)
            stack = []
        elif name == "TUPLE":
            items = pop_to_mark()
            stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(items[::-1]))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else pop_to_mark()
            _require(list, stack[-1]).extend(items)
        elif name == "FROZENSET":
            items = pop_to_mark()
            stack.append(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else pop_to_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _set_item(stack[-1], key, value)
        elif name == "GLOBAL":
            stack.append(_find_global(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_find_global(_require(str, module), _require(str, attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], OpaqueObject):
                stack[-1].state = state
            else:  # the `_metadata` of a state dict, which is not needed
                _require(dict, stack[-1])
        elif name == "BINPERSID":
            stack.append(load_storage(stack.pop()))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            pop_to_mark()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise WeightsError(
                f"has a pickle with {name}, which torch.save never writes. {RESAVE_HINT}"
            )


# Opcodes whose argument is the value.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
# Opcodes without an argument that push a new value.
_CONSTRUCTORS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # a set would have to hash its elements
}


class _LimitedFile:
    """Limits the bytes of one pickle, whatever lengths the pickle claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._remaining = file, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._count(self._file.read(max(0, min(size, self._remaining))))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._remaining))

    def _count(self, data: bytes) -> bytes:
        self._remaining -= len(data)
        return data


def _require(kind: type, value: Any) -> Any:
    """Returns the value if it is exactly of this type; raises TypeError otherwise."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} should be")
    return value


def _set_item(target: Any, key: Any, value: Any) -> None:
    # Hashing other keys could take forever, such as tuples of tuples of the same tuple.
    parts = key if type(key) is tuple and len(key) <= _MAX_KEY_LENGTH else (key,)
    for part in parts:
        if type(part) not in (str, int, float, bool, bytes, type(None)):
            raise WeightsError(
                f"has a dict with a key that is a {type(part).__name__}. {RESAVE_HINT}"
            )
    _require(dict, target)[key] = value


def _find_global(module: str, attribute: str) -> _Global:
    module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core", "numpy.core")
    name = f"{module}.{attribute}"
    if name not in _GLOBALS:
        raise WeightsError(
            f"asks for {name[:200]}, which is neither a tensor nor a container; nothing was run. "
            + RESAVE_HINT
        )
    return _Global(name, _GLOBALS[name])


def _call(function: Any, arguments: Any) -> Any:
    return _require(_Global, function).function(*_require(tuple, arguments))


# Tensors.


def parse_storage(persistent_id: Any) -> tuple[str, str, int]:
    """Returns the dtype, key and number of elements of a storage.

    Args:
      persistent_id: `("storage", type, key, device, numel)`.
    """
    tag, storage_type, key, _, numel = _require(tuple, persistent_id)
    dtype = _STORAGES.get(_require(_Global, storage_type).name)
    if tag != "storage" or dtype is None or type(key) is not str or not is_count(numel):
        raise ValueError("a storage without a proper name or length")
    return dtype, key, numel


def is_count(value: Any) -> bool:
    """Returns whether a value can be a number of elements."""
    return type(value) is int and 0 <= value < 1 << 60


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor:
    _require(Storage, storage)
    counts = (offset, *_require(tuple, size), *_require(tuple, stride))
    if not (len(size) == len(stride) <= _MAX_RANK and all(map(is_count, counts))):
        raise WeightsError(
            f"is damaged: a tensor of shape {_short_repr(size)}, strides {_short_repr(stride)}"
        )
    dtype = DTYPES[storage.dtype]
    numel = math.prod(size)
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if numel else 0
    if offset + span > storage.numel or math.prod(n or 1 for n in size) > sys.maxsize // 16:
        raise WeightsError(f"is damaged: a tensor {_short_repr(size)} reaches beyond its storage")
    if numel > storage.numel and numel * dtype.itemsize > _MAX_EXPANDED_BYTES:
        raise WeightsError(
            f"expands {storage.numel:,} elements to a tensor {_short_repr(size)}: too large"
        )
    start = (storage.first + offset) * dtype.itemsize

    def read() -> np.ndarray:
        flat = np.frombuffer(storage.read_bytes(start, start + span * dtype.itemsize), dtype)
        if storage.byte_order != sys.byteorder:
            flat = flat.view(f"u{dtype.itemsize}").byteswap().view(dtype)
        if not numel:
            return np.empty(size, dtype)
        strides = [s * dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat, size, strides).copy()

    return LazyTensor(size, storage.dtype, read)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, bits: Any = None
) -> LazyTensor:
    if bits:
        raise WeightsError(f"holds a tensor with a pending negation or conjugation. {RESAVE_HINT}")
    return _rebuild_tensor(storage, offset, size, stride)


def _short_repr(value: Any) -> str:
    return repr(value)[:80]


# Names that a pickle may contain.


def _opaque(name: str) -> Callable[..., OpaqueObject]:
    return lambda *_: OpaqueObject(name)


def _dict(items: Any = ()) -> dict[Any, Any]:
    """Converts the argument of a Counter (a dict) or a Python 2 OrderedDict (a list of pairs)."""
    if type(items) is dict:
        return items
    result: dict[Any, Any] = {}
    for key, value in items:
        _set_item(result, key, value)
    if items:
        # Clear the list, so that a pickle that refers to it repeatedly does not copy it each time.
        _require(list, items).clear()
    return result


_DTYPES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8",
}  # fmt: skip
_STORAGES = {
    "torch.storage.UntypedStorage": "U8",
    **{f"torch.{kind}Storage": dtype for kind, dtype in _DTYPES.items()},
    **{f"torch.cuda.{kind}Storage": dtype for kind, dtype in _DTYPES.items()},
}
# Options, devices, dtypes and metrics, which checkpoints also hold.
_OPAQUE = {
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
    **{name: _opaque(name) for name in _STORAGES},
    **{
        f"{module}.{name}": _opaque(f"{module}.{name}")
        for module, names in _OPAQUE.items()
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
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
}
