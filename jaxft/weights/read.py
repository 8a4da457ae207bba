"""Opens weights of any source and format as named tensors, before a network is known."""

import reprlib
from collections.abc import Mapping
from contextlib import suppress
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
from jaxft.models.key_map import KeyMap
from jaxft.models.lora_model import merged_params
from jaxft.models.model import Model
from jaxft.weights.description import Description, from_metadata, parse
from jaxft.weights.key_maps import own_tensors, torch_tensors
from jaxft.weights.locate import locate
from jaxft.weights.network_prefix import select_prefix
from jaxft.weights.preprocessing_config import find_description
from jaxft.weights.state_dict import unwrap
from jaxft.weights.tensors import DTYPES, LazyTensor
from jaxft.weights.torch_format.torch_file import open_torch

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """Tensors of a weights file, not read yet.

    Attributes:
      source: Source that the user named.
      tensors: Tensors by their names in the file, without wrappers unless `own_names`.
      preprocessing: Preprocessing of the images that the weights expect, if the source states it.
      remarks: A sentence per choice, renaming or omission.
      network: Description of the weights' network, as far as the source has one.
    """

    source: str
    tensors: Mapping[str, LazyTensor]
    preprocessing: Preprocessing | None
    remarks: tuple[str, ...]
    network: Description = field(default_factory=Description)

    def num_classes(self, model: Model) -> int | None:
        """Returns the number of outputs of the last layer of the head; None if there is no head.

        Args:
          model: the weights' network, with any number of classes.
        """
        key_map = model.key_map or KeyMap()
        shapes = ((f".{key_map.rename(name)}", x.shape) for name, x in self.tensors.items())
        outputs = [shape[0] for name, shape in shapes if f".{model.head}." in name and shape]
        return outputs[-1] if outputs else None


def read(source: str | PathLike[str], *, own_names: bool = False) -> Weights:
    """Opens weights; tensors are read later, one by one.

    The file may be a safetensors file, a file of `torch.save` (opened without torch, and without
    running code in it), a run's folder, or one of its checkpoints.

    Args:
      source: Path, `hf:OWNER/REPO`, `torchvision:ENUM.MEMBER`, `https://...#sha256=...` or
        `asset:NAME`. See `locate` for all forms.
      own_names: Keep the names and layouts in the file, for a network without a `key_map`.

    Raises:
      WeightsError: The source does not exist, or holds no weights.
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
        content, network = _open_run(located.path, own_names)
    elif _is_safetensors(located.path):
        content, network = _open_safetensors(located.path)
    else:
        content, own_names = open_torch(located.path), False  # torch files never have Flax's names
    network = network.with_defaults(find_description(located.path))
    remarks: tuple[str, ...] = ()
    if not own_names:
        tensors, remarks = unwrapped_tensors(content, name, located.entry, located.prefix)
    elif located.prefix is not None:
        tensors, remark = select_prefix(content, located.prefix, name)
        remarks = (remark,)
    else:
        tensors = content
    return Weights(name, tensors, located.preprocessing, remarks, network)


def describe(source: str | PathLike[str]) -> tuple[Description, Preprocessing | None]:
    """Returns the network and the preprocessing that a source states, without its tensors.

    Args:
      source: As in `read`.

    Raises:
      WeightsError: The source does not exist.
    """
    located = locate(fspath(source))
    path, network = located.path, Description()
    if path.is_dir():
        from jaxft.checkpoint import weights_only

        with suppress(CheckpointError, OSError):  # `read` explains them
            network = parse(weights_only.read_description(_checkpoint(path)))
    elif _is_safetensors(path):
        network = _open_safetensors(path)[1]
    return network.with_defaults(find_description(path)), located.preprocessing


def unwrapped_tensors(
    content: Any, source: str, entry: str | None = None, prefix: str | None = None
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Returns the tensors of a state dict without the names of wrappers, and `unwrap`'s remarks."""
    tensors, remarks = unwrap(content, source, entry, prefix)
    return tensors, tuple(f"{r[0].upper()}{r[1:].removesuffix('.')}." for r in remarks)


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    return start.endswith(b"{") and len(start) == 9  # eight bytes of length, then JSON


def _open_safetensors(path: Path) -> tuple[dict[str, LazyTensor], Description]:
    def read_tensor(name: str) -> np.ndarray:
        # Open the file per tensor, so that the mapped pages of earlier tensors, which count as
        # memory, are released. Through NumPy, so that torch is not needed; jax registers bfloat16.
        with safe_open(path, framework="np") as file:
            return np.asarray(file.get_tensor(name))

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: LazyTensor(tuple(s.get_shape()), s.get_dtype(), partial(read_tensor, name))
                for name, s in slices.items()
            }
            return tensors, from_metadata(file.metadata())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _open_run(folder: Path, own_names: bool) -> tuple[dict[str, LazyTensor], Description]:
    """Opens a run's newest checkpoint, a given checkpoint, or the weights that a run exported."""
    from jaxft.checkpoint import weights_only

    checkpoint, exported = _checkpoint(folder), folder / "model.safetensors"
    if exported.is_file() and checkpoint == folder:
        return _open_safetensors(exported)
    try:
        params, stats = weights_only.read_weights(checkpoint)
    except CheckpointError as error:
        raise WeightsError(_no_weights_message(folder, str(error))) from error
    description = weights_only.read_description(checkpoint)
    trees = merged_params(params, description), stats
    targets = jax.tree.leaves((own_tensors if own_names else torch_tensors)(*trees))
    tensors = {
        target.name: LazyTensor(
            target.shape, _DTYPE_NAMES[array.dtype], partial(target.to_torch, array)
        )
        for target, array in zip(targets, jax.tree.leaves(trees), strict=True)
    }
    return tensors, parse(description)


def _checkpoint(folder: Path) -> Path:
    """Returns the folder of a run's checkpoints, or a folder that is a checkpoint itself."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def _no_weights_message(folder: Path, cause: str) -> str:
    """Returns the message for a folder without weights, with the source to name instead."""
    if (folder / "recipe.yaml").is_file():
        return (
            f"{folder} is the folder of a run that has no checkpoint yet: wait for the first one, "
            "or name other weights."
        )
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".th", ".ckpt")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if files:
        return f"{folder} is a folder, but not a run's. Name a file in it: {files[0]}"
    return f"{cause} Name a run's folder, one of its checkpoints, or a weights file."
