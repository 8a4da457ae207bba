"""Names and layouts of tensors in weights files of torch and other libraries."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.key_map import KeyMap, Resize
from jaxft.models.model import Model, Tree
from jaxft.models.norm_modes import dotted
from jaxft.weights.tensors import LazyTensor

# (leaf in jaxft, rank): (leaf in torch, jaxft's axes in torch's order).
# The rest of a path is the same in both, and so are other leaves, such as `pos_embed` and `gamma`.
_TORCH_LEAVES: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (3, 2, 0, 1)),  # hwio -> oihw
    ("kernel", 3): ("weight", (2, 1, 0)),  # wio -> oiw
    ("kernel", 2): ("weight", (1, 0)),  # io -> oi
    ("scale", 1): ("weight", (0,)),
    ("bias", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
}


@dataclass(frozen=True)
class TorchTensor:
    """Name and layout of an array in a weights file.

    Attributes:
      name: Name in the file, such as `layer4.0.conv1.weight`.
      shape: Shape in the file.
      axes: jaxft's axes in the file's order.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def to_torch(self, array: Any) -> np.ndarray:
        """Transposes an array from jaxft's layout to the file's; the result is contiguous."""
        return np.ascontiguousarray(np.transpose(array, self.axes))

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Transposes an array from the file's layout to jaxft's."""
        return np.transpose(array, np.argsort(self.axes))


def file_tensors(model: Model, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Returns `torch_tensors` for a network with torch's names, else `own_tensors`.

    The layouts of a user's module cannot be derived from the rank of a kernel: a flattened image, a
    transposed convolution and attention have other layouts in torch.
    """
    return (torch_tensors if model.key_map else own_tensors)(params, stats)


def own_tensors(params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Returns a `TorchTensor` per leaf of both trees, with jaxft's path and layout."""

    def unchanged(path: tuple[Any, ...], leaf: Any) -> TorchTensor:
        return TorchTensor(dotted(path), leaf.shape, tuple(range(len(leaf.shape))))

    return (
        jax.tree_util.tree_map_with_path(unchanged, params),
        jax.tree_util.tree_map_with_path(unchanged, stats),
    )


def torch_tensors(params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Returns a `TorchTensor` per leaf of both trees, with torch's name and layout.

    Only the shapes of the leaves are read.
    """
    return (
        jax.tree_util.tree_map_with_path(_torch_tensor, params),
        jax.tree_util.tree_map_with_path(_torch_tensor, stats),
    )


def _torch_tensor(path: tuple[Any, ...], leaf: Any) -> TorchTensor:
    *module, leaf_name = (key.key for key in path)
    unchanged = (leaf_name, tuple(range(len(leaf.shape))))
    torch_name, axes = _TORCH_LEAVES.get((leaf_name, len(leaf.shape)), unchanged)
    shape = tuple(leaf.shape[axis] for axis in axes)
    return TorchTensor(".".join((*module, torch_name)), shape, axes)


def renamed(
    tensors: Mapping[str, LazyTensor], key_map: KeyMap, source: str
) -> dict[str, LazyTensor]:
    """Returns the tensors of a file by the network's names; joins those that are parts of one.

    Args:
      tensors: tensors by the names in the file.
      key_map: the network's key map.
      source: name of the weights, for messages.

    Raises:
      WeightsError: Two of them mean the same tensor.
    """
    result: dict[str, LazyTensor] = {}
    names: dict[str, list[str]] = {}
    parts: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        target, part, count = key_map.find(name)
        if key_map.ignores(name):
            continue
        if target != name and target in tensors:
            target = name  # the file has that name too, so this is another tensor
        elif part is not None:
            found = parts.setdefault(target, {})
            found[part] = name
            if len(found) < count:
                continue
            tensor = _joined([tensors[found[i]] for i in range(count)])
        names.setdefault(target, []).append(name)
        result[target] = tensor
    if doubles := [f"{' and '.join(n)} (both {t})" for t, n in names.items() if len(n) > 1]:
        raise WeightsError(f"{source} has two tensors for one: {', '.join(doubles)}")
    incomplete = (found for target, found in parts.items() if target not in result)
    return result | {name: tensors[name] for found in incomplete for name in found.values()}


def _joined(tensors: Sequence[LazyTensor]) -> LazyTensor:
    length = sum(tensor.shape[0] for tensor in tensors)
    return LazyTensor(
        (length, *tensors[0].shape[1:]),
        tensors[0].dtype,
        lambda: np.concatenate([tensor.read() for tensor in tensors]),
    )


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape without its axes of length 1."""
    return tuple(size for size in shape if size != 1)


def reshaped(
    tensors: Mapping[str, LazyTensor], expected: Mapping[str, TorchTensor]
) -> dict[str, LazyTensor]:
    """Gives tensors the network's shape where only axes of length 1 differ, as in 1x1 kernels."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        new = expected[name].shape if name in expected else tensor.shape
        if tensor.shape != new and squeezed(tensor.shape) == squeezed(new):
            result[name] = LazyTensor(new, tensor.dtype, partial(_read_reshaped, tensor, new))
    return result


def _read_reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.read().reshape(shape)


def resized(
    tensors: Mapping[str, LazyTensor], expected: Mapping[str, TorchTensor], key_map: KeyMap
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Resizes the tensors that depend on the image size; returns all tensors, and remarks."""
    result, remarks = dict(tensors), []
    for name, resize in key_map.resized.items():
        if name not in tensors or name not in expected:
            continue
        old, new = tensors[name], expected[name].shape
        if old.shape == new:
            continue
        with suppress(ValueError):  # reported as a mismatch of shapes
            resize(np.zeros(old.shape, np.float32), new)
            result[name] = LazyTensor(new, old.dtype, partial(_read_resized, old, resize, new))
            remarks.append(f"Resized {name} from {list(old.shape)} to {list(new)}.")
    return result, remarks


def _read_resized(tensor: LazyTensor, resize: Resize, shape: tuple[int, ...]) -> np.ndarray:
    return resize(tensor.read(), shape)
