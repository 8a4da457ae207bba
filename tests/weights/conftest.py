"""Weights of a small network, as trees and as the tensors of a file."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.models import create
from jaxft.weights import save

MODEL = create("cifar_resnet8", num_classes=5)


@pytest.fixture(scope="session")
def trees():
    """Returns `(params, stats)` in which no two leaves are equal."""
    params, stats = MODEL.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten((params, stats))
    return structure.unflatten([leaf + 0.01 * i for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="session")
def tensors(trees, tmp_path_factory) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of `MODEL`, by name."""
    path = tmp_path_factory.mktemp("weights") / "fits.safetensors"
    save(path, MODEL, *trees)
    return load_file(path)
