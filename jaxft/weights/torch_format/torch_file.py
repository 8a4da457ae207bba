"""Opens files of `torch.save` without torch, in the zip format (torch 1.6) or the legacy format."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from jaxft.errors import WeightsError
from jaxft.weights.tensors import DTYPES
from jaxft.weights.torch_format.torch_pickle import (
    MAX_PICKLE_BYTES,
    RESAVE_HINT,
    Storage,
    is_count,
    parse_storage,
    unpickle,
)

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001
# Limits against zip bombs. torch does not compress; other tools compress real weights little.
_MAX_UNPACKED_BYTES = 16 << 20
_MAX_RATIO = 100  # for larger entries
_NUMPY_HINT = " jaxft.weights.from_state_dict takes NumPy's arrays, by torch's names."


def open_torch(path: Path) -> Any:
    """Opens a file of `torch.save`; tensors are read later, and no code in the file is run.

    Returns:
      Dicts, lists, tuples and scalars, with a `LazyTensor` per tensor. An OrderedDict becomes a
      dict, a set a list, and options and similar objects a `torch_pickle.OpaqueObject`.

    Raises:
      WeightsError: The file contains any other object, which is named, or is not of torch.save.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}")
    with _errors_name_file(path), path.open("rb") as file:
        start = file.read(512)
        if start.startswith(b"PK\x03\x04"):
            return _open_zip(path)
        if start.startswith(b"\x80"):
            file.seek(0)
            return _open_legacy(path, file)
        raise WeightsError(_identify(start))


@contextmanager
def _errors_name_file(path: Path) -> Iterator[None]:
    """Turns every error into a WeightsError that names the file; damage can cause any exception."""
    try:
        yield
    except WeightsError as error:
        # The message may quote the file: a terminal must not interpret it.
        message = "".join(c if c.isprintable() else "?" for c in str(error)[:1000])
        raise WeightsError(f"{path} {message}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(
            f"{path} is damaged or cut short ({cause}). Download it again."
        ) from error


def _identify(start: bytes) -> str:
    """Returns the message for a file of another format, from its first bytes."""
    if not start:
        return "is empty. Download it again."
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "looks like a web page, perhaps one about the file. Download the file itself."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to. Run `git lfs pull`."
    if start[257:262] == b"ustar":
        return f"is a tar file, as written by torch before 0.1.10. {RESAVE_HINT}"
    if start.lstrip().startswith(b"{"):
        return "is JSON, not weights. Name the weights file next to it, or a run's folder."
    return f"is neither a file of torch.save nor safetensors: it begins with {start[:8]!r}." + (
        _NUMPY_HINT
        if start.startswith(b"\x93NUMPY")
        else " Name a .safetensors file, or one that torch.save wrote."
    )


def _open_zip(path: Path) -> Any:
    # Stays open as long as one of its tensors exists, because opening parses the whole directory.
    archive = ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    root = next((n[: -len("/data.pkl")] for n in entries if n.endswith("/data.pkl")), None)
    if root is None:
        names = ", ".join(repr(name[:60]) for name in list(entries)[:5])
        is_numpy = all(name.endswith(".npy") for name in entries)
        raise WeightsError(
            f"is a zip file, but not of torch.save: no data.pkl. It holds {names}"
            + (f".{_NUMPY_HINT}" if is_numpy else "")
        )
    if f"{root}/constants.pkl" in entries:
        raise WeightsError(
            "is a TorchScript program. In torch, save its tensors alone: "
            "torch.save(torch.jit.load(path).state_dict(), 'model.pth')."
        )
    byte_order = "little"
    if info := entries.get(f"{root}/byteorder"):
        byte_order = _read_entry(path, archive, info, 0, 16).decode()
        if byte_order not in ("little", "big"):
            raise WeightsError(f"is damaged: its byte order is {byte_order!r}")

    def load_storage(persistent_id: Any) -> Storage:
        dtype, key, numel = parse_storage(persistent_id)
        info = entries.get(f"{root}/data/{key}")
        if info is None:
            raise WeightsError(f"is damaged: it lacks its tensor data/{key[:60]}")
        size = numel * DTYPES[dtype].itemsize
        if info.file_size != size:
            raise WeightsError(f"is damaged: data/{key} is {info.file_size:,} bytes, not {size:,}")
        _check_entry(path, info)

        def read_bytes(start: int, stop: int) -> bytes:
            with _errors_name_file(path):
                return _check_length(_read_entry(path, archive, info, start, stop), stop - start)

        return Storage(dtype, 0, numel, byte_order, read_bytes)

    info = entries[f"{root}/data.pkl"]
    if info.file_size > MAX_PICKLE_BYTES:
        raise WeightsError(
            f"has a data.pkl of {info.file_size:,} bytes, which is too large for a checkpoint"
        )
    _check_entry(path, info)
    with archive.open(info) as file:
        return unpickle(file, load_storage)


def _check_entry(path: Path, info: ZipInfo) -> None:
    """Checks that an entry's sizes are consistent with the file, so that reading it is safe."""
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise WeightsError(f"is damaged: {info.filename} has a compression that torch never uses")
    packed, size = info.compress_size, info.file_size
    is_stored = info.compress_type == ZIP_STORED
    if packed > path.stat().st_size or (is_stored and packed != size):
        raise WeightsError(f"is damaged or cut short: {info.filename} is incomplete")
    if size > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * packed):
        raise WeightsError(
            f"looks like a zip bomb: {info.filename} would grow from {packed:,} to {size:,} bytes"
        )


def _read_entry(path: Path, archive: ZipFile, info: ZipInfo, start: int, stop: int) -> bytes:
    """Reads a range of bytes; zipfile verifies the checksum if it includes the last byte."""
    _check_entry(path, info)
    with archive.open(info) as file:
        file.seek(start)
        return file.read(stop - start)


def _check_length(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise WeightsError(
            f"is damaged or cut short: {len(data):,} bytes of a tensor, not {size:,}"
        )
    return data


def _open_legacy(path: Path, file: IO[bytes]) -> Any:
    """Reads the legacy format: several pickles, then the length and bytes of each storage."""
    file_size = path.stat().st_size
    storages: dict[str, tuple[str, int]] = {}
    offsets: dict[str, int] = {}  # filled after the pickles are read

    def no_storage(persistent_id: Any) -> Any:
        raise WeightsError("is damaged: there is a tensor in its header")

    def load_storage(persistent_id: Any) -> Storage:
        *base_id, view = persistent_id
        dtype, key, numel = parse_storage(tuple(base_id))
        if storages.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise WeightsError(f"is damaged: its storage {key[:60]} is of two types")
        first, length = 0, numel
        if view is not None:  # torch before 0.4: a storage may be a part of another
            _, first, length = view
            if not (is_count(first) and is_count(length) and first + length <= numel):
                raise WeightsError(f"is damaged: a part of storage {key[:60]} reaches beyond it")

        def read_bytes(start: int, stop: int) -> bytes:
            with _errors_name_file(path), path.open("rb") as reopened:
                reopened.seek(offsets[key] + start)
                return _check_length(reopened.read(stop - start), stop - start)

        # Always little-endian; the header only records the byte order of the machine.
        return Storage(dtype, first, length, "little", read_bytes)

    if unpickle(file, no_storage) != _MAGIC:
        raise WeightsError(f"is a pickle, but not of torch.save. {RESAVE_HINT}")
    if unpickle(file, no_storage) != _PROTOCOL:
        raise WeightsError(f"is of another protocol than {_PROTOCOL}, the only known one")
    unpickle(file, no_storage)  # properties of the machine
    content = unpickle(file, load_storage)
    keys = unpickle(file, no_storage)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise WeightsError("is damaged: its list of storages does not match its tensors")
    for key in keys:
        dtype, numel = storages[key]
        offsets[key] = file.tell() + 8
        end = offsets[key] + numel * DTYPES[dtype].itemsize
        if end > file_size:
            raise WeightsError(
                f"is cut short: it has {file_size:,} bytes, and needs at least {end:,}"
            )
        (length,) = struct.unpack("<q", file.read(8))
        if length != numel:
            raise WeightsError(f"is damaged: a storage has {length:,} elements, not {numel:,}")
        file.seek(end)
    return content
