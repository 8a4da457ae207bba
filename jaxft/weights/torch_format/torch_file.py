"""Opens a file of `torch.save` without torch: the zip form of torch 1.6 on, and the older one."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from jaxft.errors import WeightsError
from jaxft.weights.tensors import DTYPES
from jaxft.weights.torch_format.torch_pickle import (
    PICKLE_BYTES,
    WAY_OUT,
    Storage,
    is_count,
    parse_storage,
    unpickle,
)

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001
# torch stores its tensors as they are; what others pack again shrinks little, but for zeros.
_UNPACKED_BYTES = 16 << 20
_UNPACKED_RATIO = 100  # above those
_ARRAYS = " jaxft.weights.from_state_dict takes NumPy's arrays, by torch's names."


def open_torch(path: Path) -> Any:
    """What the file holds: dicts, lists, tuples and scalars, with a `LazyTensor` for each tensor.

    An OrderedDict comes as a dict and a set as a list; a `torch_pickle.Inert` stands for options
    and the like. Tensors are not read yet, and nothing that the file names is run.

    Raises:
      WeightsError: the file asks for anything else, which is named, or torch.save never wrote it.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}")
    with _told_of(path), path.open("rb") as file:
        head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            return _open_zip(path)
        if head.startswith(b"\x80"):
            file.seek(0)
            return _open_legacy(path, file)
        raise WeightsError(_stranger(head))


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Every error becomes one that names the file; damage can show as any exception."""
    try:
        yield
    except WeightsError as error:
        # What it quotes is the file's: a terminal could take it for commands.
        said = "".join(c if c.isprintable() else "?" for c in str(error)[:1000])
        raise WeightsError(f"{path} {said}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(f"{path} is damaged or cut short ({what}). Get it again.") from error


def _stranger(head: bytes) -> str:
    """What a file is that torch.save did not write."""
    if not head:
        return "is empty. Get it again."
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "looks like a web page, perhaps one about the file. Get the file itself."
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to. Run `git lfs pull`."
    if head[257:262] == b"ustar":
        return f"is a tar, as torch before 0.1.10 wrote it. {WAY_OUT}"
    if head.lstrip().startswith(b"{"):
        return "is JSON, no weights. Name the weights file beside it, or a run's folder."
    return f"is no file of torch.save, nor safetensors: it begins with {head[:8]!r}." + (
        _ARRAYS
        if head.startswith(b"\x93NUMPY")
        else " Name a .safetensors file, or one that torch.save wrote."
    )


def _open_zip(path: Path) -> Any:
    # Kept open for as long as one of its tensors is there: to find an entry takes its directory.
    archive = ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    root = next((n[: -len("/data.pkl")] for n in entries if n.endswith("/data.pkl")), None)
    if root is None:
        found = ", ".join(repr(name[:60]) for name in list(entries)[:5])
        arrays = all(name.endswith(".npy") for name in entries)
        raise WeightsError(
            f"is a zip, but not of torch.save: no data.pkl. It holds {found}"
            + (f".{_ARRAYS}" if arrays else "")
        )
    if f"{root}/constants.pkl" in entries:
        raise WeightsError(
            "is a TorchScript program. In torch, save its tensors alone: "
            "torch.save(torch.jit.load(path).state_dict(), 'model.pth')."
        )
    order = "little"
    if info := entries.get(f"{root}/byteorder"):
        order = _read_entry(path, archive, info, 0, 16).decode()
        if order not in ("little", "big"):
            raise WeightsError(f"is damaged: its byte order is {order!r}")

    def storage(identity: Any) -> Storage:
        dtype, key, numel = parse_storage(identity)
        info = entries.get(f"{root}/data/{key}")
        if info is None:
            raise WeightsError(f"is damaged: it lacks its tensor data/{key[:60]}")
        size = numel * DTYPES[dtype].itemsize
        if info.file_size != size:
            raise WeightsError(f"is damaged: data/{key} is {info.file_size:,} bytes, not {size:,}")
        _check_entry(path, info)

        def fetch(start: int, stop: int) -> bytes:
            with _told_of(path):
                return _whole(_read_entry(path, archive, info, start, stop), stop - start)

        return Storage(dtype, 0, numel, order, fetch)

    info = entries[f"{root}/data.pkl"]
    if info.file_size > PICKLE_BYTES:
        raise WeightsError(f"has a data.pkl of {info.file_size:,} bytes, which is no checkpoint's")
    _check_entry(path, info)
    with archive.open(info) as file:
        return unpickle(file, storage)


def _check_entry(path: Path, info: ZipInfo) -> None:
    """Whether to read it takes no more than the file has to give."""
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise WeightsError(f"is damaged: {info.filename} is packed as no zip of torch is")
    packed, size = info.compress_size, info.file_size
    stored = info.compress_type == ZIP_STORED
    if packed > path.stat().st_size or (stored and packed != size):
        raise WeightsError(f"is damaged or cut short: {info.filename} is not all there")
    if size > max(_UNPACKED_BYTES, _UNPACKED_RATIO * packed):
        raise WeightsError(
            f"looks like a zip bomb: {info.filename} would grow from {packed:,} to {size:,} bytes"
        )


def _read_entry(path: Path, archive: ZipFile, info: ZipInfo, start: int, stop: int) -> bytes:
    """From one of its bytes to another; with the last of them, zipfile compares the checksum."""
    _check_entry(path, info)
    with archive.open(info) as file:
        file.seek(start)
        return file.read(stop - start)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise WeightsError(
            f"is damaged or cut short: {len(data):,} bytes of a tensor, not {size:,}"
        )
    return data


def _open_legacy(path: Path, file: IO[bytes]) -> Any:
    """Pickles one after the other, then each storage as its length and its bytes."""
    size = path.stat().st_size
    storages: dict[str, tuple[str, int]] = {}
    positions: dict[str, int] = {}  # known only when the pickles are read

    def none(identity: Any) -> Any:
        raise WeightsError("is damaged: there is a tensor where none can be")

    def storage(identity: Any) -> Storage:
        *identity, view = identity
        dtype, key, numel = parse_storage(tuple(identity))
        if storages.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise WeightsError(f"is damaged: its storage {key[:60]} is of two kinds")
        first, length = 0, numel
        if view is not None:  # of torch before 0.4: a storage that is a part of another
            _, first, length = view
            if not (is_count(first) and is_count(length) and first + length <= numel):
                raise WeightsError(f"is damaged: a part of storage {key[:60]} reaches beyond it")

        def fetch(start: int, stop: int) -> bytes:
            with _told_of(path), path.open("rb") as again:
                again.seek(positions[key] + start)
                return _whole(again.read(stop - start), stop - start)

        # Little-endian whatever the machine, and whatever the header says of the machine.
        return Storage(dtype, first, length, "little", fetch)

    if unpickle(file, none) != _MAGIC:
        raise WeightsError(f"is a pickle, but not of torch.save. {WAY_OUT}")
    if unpickle(file, none) != _PROTOCOL:
        raise WeightsError(f"is of another protocol than {_PROTOCOL}, the only one there was")
    unpickle(file, none)  # of the machine
    content = unpickle(file, storage)
    keys = unpickle(file, none)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise WeightsError("is damaged: its list of storages is not that of its tensors")
    for key in keys:
        dtype, numel = storages[key]
        positions[key] = file.tell() + 8
        stop = positions[key] + numel * DTYPES[dtype].itemsize
        if stop > size:
            raise WeightsError(f"is cut short: of {stop:,} bytes or more, {size:,} are there")
        (length,) = struct.unpack("<q", file.read(8))
        if length != numel:
            raise WeightsError(f"is damaged: a storage is {length:,} elements, not {numel:,}")
        file.seek(stop)
    return content
