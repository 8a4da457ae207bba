"""Networks with all names of their family, but few channels: for what does not depend on size."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import pytest

from jaxft.models import registry
from jaxft.models.networks.resnet import ResNetConfig


@dataclass(frozen=True)
class Narrow(ResNetConfig):
    """A network with all layers and names, but few channels."""

    @property
    def widths(self):
        """Of each layer."""
        return (8, 8, 16, 16)[: len(self.depths)]


def _narrow(config, most):
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "depths"}
    return Narrow(**options, depths=tuple(min(depth, most) for depth in config.depths))


@contextmanager
def narrowed(stages):
    """Within it each of our networks is narrow, with one block a layer, or two if stages say so."""
    registry.names()  # imports the networks
    patterns = " ".join(pattern for stage in stages for pattern in stage.train)
    most = 2 if re.search(r"layer\d\.1", patterns) else 1
    few = {
        name: replace(model, config=_narrow(model.config, most))
        for name, model in registry._NETWORKS.items()
        if isinstance(model.config, ResNetConfig)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_NETWORKS", registry._NETWORKS | few)
        yield
