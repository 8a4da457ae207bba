"""Records the tensors and preprocessing of timm's CNNs, for test_listings.py.

    python tests/models/record_listings.py

Needs torch and timm. The file holds a digest of names and shapes for each network.
"""

import hashlib
import json
from collections.abc import Mapping

import record_golden
from record_timm import GOLDEN, NUM_CLASSES, is_weight

from jaxft.models.networks import efficientnet_variants, regnet_variants, senet_variants

LISTINGS = GOLDEN / "listings.json"
NAMES = (*senet_variants.NAMES, *regnet_variants.NAMES, *efficientnet_variants.NAMES)
"""Networks that differ from the cases of timm_cases.py in depths and widths alone."""


def summary(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | int]:
    """Returns the number of tensors, and a digest of their names and shapes."""
    listing = record_golden.listing(shapes)
    return {"tensors": len(shapes), "digest": hashlib.sha256(listing.encode()).hexdigest()[:16]}


def record(name: str) -> dict[str, object]:
    """Builds a network of timm without memory; returns its summary and preprocessing."""
    import torch

    record_golden.import_torchvision()  # timm needs it
    import timm

    with torch.device("meta"):
        module = timm.create_model(name, num_classes=NUM_CLASSES)
    shapes = {n: tuple(x.shape) for n, x in module.state_dict().items() if is_weight(n)}
    config = module.pretrained_cfg
    fields = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return summary(shapes) | {"config": {field: config[field] for field in fields}}


if __name__ == "__main__":
    lines = (f"  {json.dumps(name)}: {json.dumps(record(name))}" for name in sorted(NAMES))
    LISTINGS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
