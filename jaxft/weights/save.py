"""Saves the weights of a network as a safetensors file."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from jaxft.checkpoint import atomic
from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.models.nnx_adapter import init_shapes
from jaxft.weights import description
from jaxft.weights.key_maps import file_tensors


def save(
    path: str | PathLike[str],
    model: Model,
    params: Tree,
    stats: Tree,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Saves `params` and `stats` with torch's names and layouts, in their dtypes.

    The file is written atomically and replaces an older one. `torch.load_state_dict` accepts it
    (except for `num_batches_tracked`), and `load` restores it bit for bit. A user's module keeps
    its paths and layouts (`Conv_0.kernel`).

    The metadata describe the network. With `stride_in_1x1` the file also has a tensor of that name,
    so that a torch network with another stride refuses it instead of computing other outputs.

    Args:
      path: File to write.
      model: Network.
      params: Its parameters.
      stats: Its running statistics.
      classes: Class names in the order of the logits, for the metadata.

    Raises:
      WeightsError: The trees do not belong to the model.
      OSError: The folder cannot be written.
    """
    trees = (params, stats)
    expected = init_shapes(model)
    if jax.tree.map(jnp.shape, trees) != jax.tree.map(jnp.shape, expected):
        raise WeightsError(
            f"cannot write {path}: these params and stats do not belong to a {model.name} "
            f"with {model.num_classes} classes"
        )
    targets = jax.tree.leaves(file_tensors(model, *expected))
    arrays = jax.device_get(jax.tree.leaves(trees))
    tensors = {t.name: t.to_torch(array) for t, array in zip(targets, arrays, strict=True)}
    if model.options.get(description.MARK):
        tensors[description.MARK] = np.ones(1, np.uint8)
    # Not `save_file` of safetensors, which makes the file readable by its owner only.
    content = safetensors.save(tensors)
    atomic.write(path, _with_metadata(content, description.metadata(model, classes)))


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Inserts metadata into a safetensors file, in a deterministic order.

    safetensors would write several entries in random order.
    """
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(content[8:header_end])}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # keeps the tensors aligned
    return b"".join((len(encoded).to_bytes(8, "little"), encoded, memoryview(content)[header_end:]))
