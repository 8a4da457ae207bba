"""Networks with all names of their family, but few channels: for what does not depend on size."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import pytest

from jaxft.models import registry
from jaxft.models.networks.convnext import ConvNeXtConfig
from jaxft.models.networks.resnet import ResNetConfig
from jaxft.models.networks.vit import ViTConfig


@dataclass(frozen=True)
class Narrow(ResNetConfig):
    """A network with all layers and names, but few channels."""

    @property
    def widths(self):
        """Of each layer."""
        return (8, 8, 16, 16)[: len(self.depths)]


def _resnet(config, patterns):
    most = 2 if re.search(r"layer\d\.1", patterns) else 1
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "depths"}
    return Narrow(**options, depths=tuple(min(depth, most) for depth in config.depths))


def _vit(config, patterns):
    depth = max((int(i) + 1 for i in re.findall(r"blocks[.[](\d+)", patterns)), default=2)
    return replace(config, width=16, num_heads=2, depth=depth, image_size=33, patch_size=11)


def _convnext(config, patterns):
    return replace(config, widths=(8, 8, 16, 16), depths=(1, 1, 1, 1))


def shallow(train):
    """Leaves out patterns of blocks that a ViT of depth 2 or a narrow ConvNeXt does not have."""
    absent = re.compile(r"blocks\.(?![01]$)\d+|stages\.\d\.blocks\[[1-9].*")
    return {pattern: update for pattern, update in train.items() if not absent.fullmatch(pattern)}


_NARROW = {ResNetConfig: _resnet, ViTConfig: _vit, ConvNeXtConfig: _convnext}


@contextmanager
def narrowed(stages):
    """Within it each of our networks is narrow, with as few blocks as the stages' patterns allow.

    Vision transformers have patches of 11 pixels, by default three in each direction.
    """
    registry.names()  # imports the networks
    patterns = " ".join(pattern for stage in stages for pattern in stage.train)
    few = {
        name: replace(model, config=_NARROW[type(model.config)](model.config, patterns))
        for name, model in registry._NETWORKS.items()
        if type(model.config) in _NARROW
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_NETWORKS", registry._NETWORKS | few)
        yield
