"""Names and layouts of tensors in weights files of torch and other libraries."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.models.norm_modes import dotted

# (leaf in jaxft, rank): (leaf in torch, jaxft's axes in torch's order).
# The rest of a path is the same in both.
_TORCH_LEAVES: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (3, 2, 0, 1)),  # hwio -> oihw
    ("kernel", 2): ("weight", (1, 0)),  # io -> oi
    ("scale", 1): ("weight", (0,)),
    ("bias", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
}
# (pattern, name in torchvision): {0} is the pattern's first group, {after0} that number plus 1.
# The first pattern that matches a whole name counts. Other names are torchvision's or timm's.
_OTHER_LIBRARIES = (
    # ResNets of transformers, such as microsoft/resnet-50.
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", "conv1.{0}"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", "bn1.{0}"),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(\w+)",
        "layer{after0}.{1}.downsample.0.{2}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        "layer{after0}.{1}.downsample.1.{2}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(\w+)",
        "layer{after0}.{1}.conv{after2}.{3}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(\w+)",
        "layer{after0}.{1}.bn{after2}.{3}",
    ),
    (r"classifier\.1\.(\w+)", "fc.{0}"),
    # Common names of a last layer.
    (r"(?:classifier|head|last_linear)\.(weight|bias)", "fc.{0}"),
    # CIFAR ResNets of akamaster/pytorch_resnet_cifar10.
    (r"linear\.(\w+)", "fc.{0}"),
)


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
    return (torch_tensors if model.torch_named else own_tensors)(params, stats)


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

    Raises:
      WeightsError: A leaf has no counterpart in torch.
    """
    return (
        jax.tree_util.tree_map_with_path(_torch_tensor, params),
        jax.tree_util.tree_map_with_path(_torch_tensor, stats),
    )


def _torch_tensor(path: tuple[Any, ...], leaf: Any) -> TorchTensor:
    *module, leaf_name = (key.key for key in path)
    if (leaf_name, len(leaf.shape)) not in _TORCH_LEAVES:
        name = ".".join((*module, leaf_name))
        raise WeightsError(f"{name} {list(leaf.shape)} has no counterpart in torch")
    torch_name, axes = _TORCH_LEAVES[leaf_name, len(leaf.shape)]
    shape = tuple(leaf.shape[axis] for axis in axes)
    return TorchTensor(".".join((*module, torch_name)), shape, axes)


def torchvision_names(names: Iterable[str], source: str) -> Mapping[str, str]:
    """Returns torchvision's name for each of `names`.

    Raises:
      WeightsError: Two of them mean the same tensor.
    """
    names = list(names)
    targets = {name: torchvision_name(name) for name in names}
    # If the file also has torchvision's name, the other name belongs to another tensor.
    targets = {n: n if n != t and t in targets else t for n, t in targets.items()}
    sources: dict[str, list[str]] = {}
    for name, target in targets.items():
        sources.setdefault(target, []).append(name)
    if doubles := [f"{' and '.join(n)} (both {t})" for t, n in sources.items() if len(n) > 1]:
        raise WeightsError(f"{source} has two tensors for one: {', '.join(doubles)}")
    return targets


def torchvision_name(name: str) -> str:
    """Returns torchvision's name for a tensor; unknown names are returned unchanged."""
    for pattern, target in _OTHER_LIBRARIES:
        if match := re.fullmatch(pattern, name):
            groups = enumerate(match.groups())
            after = {f"after{i}": int(group) + 1 for i, group in groups if group.isdecimal()}
            return target.format(*match.groups(), **after)
    return name
