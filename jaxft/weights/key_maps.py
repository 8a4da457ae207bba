"""How a weights file names and lays out each of our arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.models.norm_modes import dotted

# (our leaf, its rank): (torch's leaf, our axes in torch's order). All else in a path is the same.
_TABLE: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (3, 2, 0, 1)),  # hwio -> oihw
    ("kernel", 2): ("weight", (1, 0)),  # io -> oi
    ("scale", 1): ("weight", (0,)),
    ("bias", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
}


@dataclass(frozen=True)
class TorchTensor:
    """One of our arrays as torch has it, or as a file of a network that torch does not know."""

    name: str
    """`layer4.0.conv1.weight`."""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Our axes in torch's order."""

    def to_torch(self, array: Any) -> np.ndarray:
        """Our layout to torch's, contiguous."""
        return np.ascontiguousarray(np.transpose(array, self.axes))

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Torch's layout to ours."""
        return np.transpose(array, np.argsort(self.axes))


def file_tensors(model: Model, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """As `torch_tensors`, or for a network of the user's own with its own paths and layouts.

    No table could know the latter: a flattened image, a transposed convolution or attention have
    other layouts in torch than a kernel's rank says.
    """
    return (torch_tensors if model.torch_named else own_tensors)(params, stats)


def own_tensors(params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """The two trees with a `TorchTensor` for each leaf, named by its path and laid out as it is."""

    def as_it_is(path: tuple[Any, ...], leaf: Any) -> TorchTensor:
        return TorchTensor(dotted(path), leaf.shape, tuple(range(len(leaf.shape))))

    return (
        jax.tree_util.tree_map_with_path(as_it_is, params),
        jax.tree_util.tree_map_with_path(as_it_is, stats),
    )


def torch_tensors(params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """The two trees with a `TorchTensor` for each leaf, of which only the shape is read.

    Raises WeightsError for a leaf that has no counterpart in torch.
    """
    return (
        jax.tree_util.tree_map_with_path(_torch_tensor, params),
        jax.tree_util.tree_map_with_path(_torch_tensor, stats),
    )


def _torch_tensor(path: tuple[Any, ...], leaf: Any) -> TorchTensor:
    *module, ours = (key.key for key in path)
    if (ours, len(leaf.shape)) not in _TABLE:
        name = ".".join((*module, ours))
        raise WeightsError(f"{name} {list(leaf.shape)} has no counterpart in torch")
    theirs, axes = _TABLE[ours, len(leaf.shape)]
    return TorchTensor(".".join((*module, theirs)), tuple(leaf.shape[i] for i in axes), axes)
