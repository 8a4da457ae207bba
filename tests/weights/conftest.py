"""A small network's trees, and what a file of them holds."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.models import create
from jaxft.weights import save

MODEL = create("cifar_resnet8", num_classes=5)


@pytest.fixture(scope="session")
def trees():
    """Trees without equal leaves."""
    params, stats = MODEL.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten((params, stats))
    return structure.unflatten([leaf + 0.01 * i for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="session")
def tensors(trees, tmp_path_factory) -> dict[str, np.ndarray]:
    """The content of a file that fits `MODEL`."""
    path = tmp_path_factory.mktemp("weights") / "fits.safetensors"
    save(path, MODEL, *trees)
    return load_file(path)
