"""Reads a torch-named safetensors file into a network's trees, or says why it cannot."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.weights.names import TorchTensor, torch_tensors
from jaxft.weights.report import Entry, mismatch


def load(
    path: str | PathLike[str],
    model: Model,
    *,
    head: Literal["keep", "fresh"] = "keep",
    key: jax.Array | None = None,
) -> tuple[Tree, Tree]:
    """The file's `(params, stats)`, float32 and structured as `model.init`'s.

    Strict in both directions: the file must hold each of the network's tensors, in its shape,
    and nothing else; only torch's `num_batches_tracked` counters are passed over. With
    `head="fresh"` the file's head, if it has one, is passed over as well, and the head is
    that of `model.init(key)` (`jax.random.key(0)` by default).

    Raises WeightsError with every mismatch at once, or where there is no readable file.
    """
    if head not in ("keep", "fresh"):
        raise ValueError(f"head is 'keep' or 'fresh', not {head!r}")
    key = jax.random.key(0) if key is None else key

    def skipped(name: str) -> bool:
        in_head = name.startswith(f"{model.head}.")
        return name.endswith("num_batches_tracked") or (head == "fresh" and in_head)

    tensors = torch_tensors(*jax.eval_shape(model.init, key))
    wanted = {t.name: t for t in jax.tree.leaves(tensors) if not skipped(t.name)}
    arrays = _read(Path(path), wanted, skipped, model)

    def leaf(tensor: TorchTensor, initial: Any) -> Any:
        if tensor.name not in arrays:
            return initial
        return jnp.array(tensor.from_torch(arrays[tensor.name]), jnp.float32)

    initial = model.init(key) if head == "fresh" else tensors
    return jax.tree.map(leaf, tensors, initial)


def _read(
    path: Path,
    wanted: Mapping[str, TorchTensor],
    skipped: Callable[[str], bool],
    model: Model,
) -> dict[str, np.ndarray]:
    """The file's tensors by name, exactly those `wanted`, in torch's layout."""
    if not path.is_file():
        raise WeightsError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}")
    try:
        # Through numpy, torch not needed; jax brings the numpy dtype for bfloat16.
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if not skipped(name)]  # noqa: SIM118
            found = {}
            for name in names:
                header = file.get_slice(name)
                found[name] = Entry(tuple(header.get_shape()), header.get_dtype())
            report = mismatch(wanted, found, model.head)
            if report is not None:
                raise WeightsError(f"{path} does not fit {model.name}: {report}")
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
