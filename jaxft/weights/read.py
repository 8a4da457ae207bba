"""Reads a weights file of any kind into named tensors, not yet those of a network."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.data import Preprocessing
from jaxft.errors import CheckpointError, WeightsError
from jaxft.weights.description import Description, from_metadata, parse
from jaxft.weights.families import renamed
from jaxft.weights.key_maps import own_tensors, torch_tensors
from jaxft.weights.locate import locate
from jaxft.weights.network_prefix import take_prefix
from jaxft.weights.preprocessing_config import described
from jaxft.weights.state_dict import unwrap
from jaxft.weights.tensors import DTYPES, LazyTensor
from jaxft.weights.torch_format.torch_file import open_torch

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """Tensors by torchvision's names, whatever their file calls them, or by those it calls them.

    source: what they were asked for by.
    preprocessing: what they expect of images, where their source says.
    remarks: a sentence for each thing that was chosen, renamed or left out.
    network: the network whose weights they are, as far as their source describes it.
    """

    source: str
    tensors: Mapping[str, LazyTensor]
    preprocessing: Preprocessing | None
    remarks: tuple[str, ...]
    network: Description = field(default_factory=Description)

    @property
    def num_classes(self) -> int | None:
        """Rows of the last layer called `fc` or within it; None where there is none."""
        named = ((f".{name}", x.shape) for name, x in self.tensors.items())
        rows = [shape[0] for name, shape in named if ".fc." in name and shape]
        return rows[-1] if rows else None


def read(source: str | PathLike[str], *, own_names: bool = False) -> Weights:
    """Opens weights without reading a tensor yet.

    `source` is anything that `locate` finds: a path, `hf:OWNER/REPO`, `torchvision:ENUM.MEMBER`,
    `https://...#sha256=...`, `asset:NAME`. The file may be safetensors, what `torch.save` wrote
    (opened without torch and without running anything in it), a run's folder, or one of its
    checkpoints.

    own_names: for a network that is not `torch_named`: names and layouts stay as they are.

    Raises:
      WeightsError: there is no such thing, or it holds no weights.
    """
    if not isinstance(source, str | PathLike):
        raise WeightsError(
            f"weights are {reprlib.repr(source)}; they must be named by a path or another source. "
            "weights.from_state_dict takes arrays in memory."
        )
    name = fspath(source)
    located = locate(name)
    network = Description()
    if located.path.is_dir():
        content, network = _run(located.path, own_names)
    elif _is_safetensors(located.path):
        content, network = _safetensors(located.path)
    else:
        content, own_names = open_torch(located.path), False  # torch names nothing as Flax does
    network = network.completed(described(located.path))
    if own_names:
        if located.prefix is None:
            return Weights(name, content, located.preprocessing, (), network)
        tensors, said = take_prefix(content, located.prefix, name)
        return Weights(name, tensors, located.preprocessing, tuple(said), network)
    tensors, remarks = named_tensors(content, name, located.entry, located.prefix)
    return Weights(name, tensors, located.preprocessing, remarks, network)


def named_tensors(
    content: Any, source: str, entry: str | None = None, prefix: str | None = None
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Returns the tensors by torchvision's names, and a sentence for each remark of `unwrap`."""
    tensors, remarks = unwrap(content, source, entry, prefix)
    targets = renamed(tensors, source)
    named = {targets[theirs]: tensor for theirs, tensor in tensors.items()}
    return named, tuple(f"{r[0].upper()}{r[1:].removesuffix('.')}." for r in remarks)


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    return head.endswith(b"{") and len(head) == 9  # eight bytes of length, then JSON


def _safetensors(path: Path) -> tuple[dict[str, LazyTensor], Description]:
    def tensor(name: str) -> np.ndarray:
        # Opened for each, so that the pages of those before are let go: of a mapped file they
        # count as memory. Through numpy, torch not needed; jax brings the dtype for bfloat16.
        with safe_open(path, framework="np") as file:
            return np.asarray(file.get_tensor(name))

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: LazyTensor(tuple(s.get_shape()), s.get_dtype(), partial(tensor, name))
                for name, s in slices.items()
            }
            return tensors, from_metadata(file.metadata())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _run(folder: Path, own_names: bool) -> tuple[dict[str, LazyTensor], Description]:
    """A run's newest checkpoint, or the one that the folder is, or what was exported to it."""
    from jaxft.checkpoint import weights_only

    checkpoints, exported = folder / "checkpoints", folder / "model.safetensors"
    if exported.is_file() and not checkpoints.is_dir():
        return _safetensors(exported)
    place = checkpoints if checkpoints.is_dir() else folder
    try:
        trees = weights_only.read_weights(place)
    except CheckpointError as error:
        raise WeightsError(_no_weights(folder, str(error))) from error
    tensors = jax.tree.leaves((own_tensors if own_names else torch_tensors)(*trees))
    named = {
        tensor.name: LazyTensor(tensor.shape, _NAMES[array.dtype], partial(tensor.to_torch, array))
        for tensor, array in zip(tensors, jax.tree.leaves(trees), strict=True)
    }
    return named, parse(weights_only.read_description(place))


def _no_weights(folder: Path, cause: str) -> str:
    """Why a folder holds no weights, and what to name instead."""
    if (folder / "recipe.yaml").is_file():
        return f"{folder} is a run's, and has no checkpoint yet: let it run on, or name others."
    kinds = (".safetensors", ".pth", ".pt", ".bin", ".th", ".ckpt")
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds)
    if files:
        return f"{folder} is a folder, and no run's. Name a file in it: {files[0]}"
    return f"{cause} Name a run's folder, one of its checkpoints, or a weights file."
