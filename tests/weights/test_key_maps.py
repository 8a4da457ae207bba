"""Our names and torch's are one to one, for every network."""

import jax
import numpy as np
import pytest

from jaxft.errors import WeightsError
from jaxft.models import create, names
from jaxft.weights.key_maps import torch_tensors


@pytest.mark.parametrize("name", names())
def test_names_are_unique(name):
    tensors = jax.tree.leaves(torch_tensors(*jax.eval_shape(create(name).init, jax.random.key(0))))
    assert len({t.name for t in tensors}) == len(tensors)


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (3, 2)])
def test_layouts_are_inverse(shape):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    tensor = torch_tensors({"conv": {"kernel": kernel}}, {})[0]["conv"]["kernel"]
    theirs = tensor.to_torch(kernel)
    assert theirs.shape == tensor.shape
    assert theirs.flags.c_contiguous
    np.testing.assert_array_equal(tensor.from_torch(theirs), kernel)


@pytest.mark.parametrize(("leaf", "rank"), [("kernel", 3), ("embedding", 2), ("mean", 2)])
def test_unknown_leaves(leaf, rank):
    with pytest.raises(WeightsError, match=f"neck.{leaf} .* no counterpart"):
        torch_tensors({"neck": {leaf: np.ones((1,) * rank)}}, {})
