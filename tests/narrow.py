"""Networks with all names of their family, but few channels: for what does not depend on size."""

from contextlib import contextmanager
from dataclasses import dataclass, fields

import pytest

from jaxft.models import registry
from jaxft.models.resnet import ResNetConfig


@dataclass(frozen=True)
class Narrow(ResNetConfig):
    """A network with all layers and names, but few channels."""

    @property
    def widths(self):
        """Of each layer."""
        return (8, 8, 16, 16)[: len(self.depths)]


@contextmanager
def narrowed(most):
    """Within it each of our networks is narrow, with at most so many blocks a layer."""
    few = {
        name: Narrow(
            **{f.name: getattr(config, f.name) for f in fields(config) if f.name != "depths"},
            depths=tuple(min(depth, most) for depth in config.depths),
        )
        for name, config in registry._CONFIGS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_CONFIGS", few)
        yield
