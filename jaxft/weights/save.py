"""Writes a network's trees as a safetensors file."""

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
    """Writes `params` and `stats` with torch's names and layouts, in their own dtypes.

    The file appears whole or not at all, over any older one. `torch.load_state_dict` takes it as
    it is (`num_batches_tracked` aside), and so does `load`, bit for bit. A module of the user's
    own keeps its own paths and layouts (`Conv_0.kernel`), which safetensors and any JAX code read.
    The file's metadata describe the network: name, options and `classes`, the names of its logits.
    With `stride_in_1x1` it also has a tensor of that name, so that a torch network that strides
    elsewhere does not load it strictly and compute something else: see README.

    Raises WeightsError where the trees are not the model's, OSError where the folder cannot be
    written.
    """
    trees = (params, stats)
    expected = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, trees) != jax.tree.map(jnp.shape, expected):
        raise WeightsError(
            f"cannot write {path}: these params and stats are not those of a {model.name} "
            f"with {model.num_classes} classes"
        )
    tensors = jax.tree.leaves(file_tensors(model, *expected))
    arrays = jax.device_get(jax.tree.leaves(trees))
    named = {t.name: t.to_torch(array) for t, array in zip(tensors, arrays, strict=True)}
    if model.options.get(description.MARK):
        named[description.MARK] = np.ones(1, np.uint8)
    # Not safetensors' own `save_file`: that leaves the file readable by its owner alone.
    atomic.write(path, _described(safetensors.save(named), description.metadata(model, classes)))


def _described(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file with metadata, the same bytes each time.

    safetensors itself writes several entries in random order.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(content[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))
