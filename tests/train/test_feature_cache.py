"""Keys of cached features, and features that are not finite."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint.contents import Snapshot
from jaxft.devices import Devices
from jaxft.errors import NonFiniteError
from jaxft.train.feature_cache import StageFeatures, _FeatureWriter
from jaxft.train.feature_storage import HostStorage
from jaxft.train.frozen_prefix import FrozenPrefix


def written(short, long, *, stops=True):
    """Returns the features at a later stage's end and at this stage's, of batches of 2 images."""

    def error(image):
        return NonFiniteError(f"image {image}")

    storage = HostStorage(Devices(), on_disk=False)
    writer = _FeatureWriter(3, 2, Devices(), storage, error if stops else None)
    for first in (0, 2):
        writer.enqueue([[jnp.array(x[first : first + 2], jnp.float32) for x in (short, long)]])
    return writer.finish()


PADDED = [1, 2, 3, np.inf]  # the last batch has one image


def test_feature_writer_leaves_out_padding():
    short, long = written(PADDED, PADDED)
    np.testing.assert_array_equal(short, [[1], [2], [3]])
    np.testing.assert_array_equal(long, [[1], [2], [3]])


def test_feature_writer_stores_no_nonfinite_features_for_a_later_stage():
    """They may be finite after the next block: ReLU makes 0 of minus infinity."""
    short, long = written([1, np.inf, 3, 0], PADDED)
    assert short is None
    np.testing.assert_array_equal(long, [[1], [2], [3]])
    short, _ = written([1, np.inf, 3, 0], PADDED, stops=False)
    np.testing.assert_array_equal(short, [[1], [np.inf], [3]])


def test_feature_writer_names_the_first_image_without_finite_features():
    with pytest.raises(NonFiniteError, match="image 2"):
        written(PADDED, [1, 2, np.nan, 0])


def digests(params, stats):
    """Returns the hashes of the blocks of a prefix, and the trees that were copied to the host."""
    model = SimpleNamespace(
        blocks=("stem", "body", "head"), block_patterns=(("stem",), ("body",), ("head",))
    )
    program = SimpleNamespace(model=model, prefix=FrozenPrefix(blocks=("stem", "body")))
    copied = []

    def host(tree):
        copied.append(tree)
        return tree

    features = StageFeatures(
        program, None, lambda: Snapshot(params, stats, ()), None, SimpleNamespace(host=host),
        None, None,
    )  # fmt: skip
    return features._digests, copied


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("stem.kernel", {"stem", "body"}),
        ("body.kernel", {"body"}),
        ("body.norm.mean", {"body"}),
        ("head.kernel", set()),
    ],
)
def test_feature_key_depends_on_weights_and_statistics_up_to_the_end(changed, expected):
    """The norm layer of the body has statistics and no parameters."""

    def trees(changed=None):
        params = {name: {"kernel": np.zeros(2)} for name in ("stem", "body", "head")}
        return jax.tree_util.tree_map_with_path(
            lambda path, x: (
                x + (jax.tree_util.keystr(path[1:], simple=True, separator=".") == changed)
            ),
            (params, {"body": {"norm": {"mean": np.zeros(2)}}}),
        )

    before, copied = digests(*trees())
    assert [sum(map(len, tree.values())) for tree in copied] == [3]  # without the head
    after, _ = digests(*trees(changed))
    assert {block for block in before if before[block] != after[block]} == expected
