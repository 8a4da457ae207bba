"""Which statistics each norm layer uses in a stage."""

from collections.abc import Mapping

from jaxft.labels import FROZEN, Tree, leaf_labels, paths
from jaxft.models import NormMode


def norm_modes(params: Tree, stats: Tree, labels: Tree) -> Mapping[str, NormMode]:
    """The mode of each norm layer: `batch` if its parameters train, `running` if frozen.

    Frozen layers then compute what they computed when they were pretrained, and their running
    statistics stay bit-identical (mode B of Keras, timm and detection, instead of torch's
    default of letting frozen layers drift).
    """
    layers = {path.rpartition(".")[0] for path in paths(stats)}
    named = zip(paths(params), leaf_labels(params, labels), strict=True)
    trained = {path.rpartition(".")[0] for path, label in named if label != FROZEN}
    return {layer: "batch" if layer in trained else "running" for layer in sorted(layers)}
