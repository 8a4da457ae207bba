"""Records timm's vision transformers, resized position embeddings and layer decay, for test_vit.py.

    python tests/models/record_vit.py

Needs torch and timm.
"""

import json
import math
import sys
import zlib

import numpy as np
import record_golden

GOLDEN = record_golden.GOLDEN / "vit.npz"
GRIDS = ((4, 6), (6, 4), (16, 37), (37, 16), (14, 24), (24, 14), (3, 1), (1, 3))
DECAY = 0.75


def positions(side: int) -> np.ndarray:
    """Random position embeddings [1 n c] of a class token and a grid."""
    shape = (1, 1 + side**2, 3)
    return np.random.default_rng(side).standard_normal(shape, np.float32)


def checksum(shapes) -> int:
    """Checksum of the names and shapes of tensors."""
    return zlib.crc32(record_golden.listing(shapes).encode())


def describe(name: str) -> list:
    """Describes a network of timm: tensors, options that have none, and preprocessing."""
    import timm
    import torch

    with torch.device("meta"):
        module = timm.create_model(name, num_classes=1000)
    (eps,) = {x.eps for x in module.modules() if isinstance(x, torch.nn.LayerNorm)}
    block, config = module.blocks[0], timm.models.get_pretrained_cfg(name)
    size = config.input_size[1]
    activation = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    return [
        checksum({n: tuple(x.shape) for n, x in module.state_dict().items()}),
        *(block.attn.num_heads, activation[type(block.mlp.act).__name__], eps, module.global_pool),
        getattr(block.ls1, "init_values", None),
        *(size, math.floor(size / config.crop_pct), config.crop_mode == "squash"),
        *(config.interpolation, config.mean, config.std),
    ]


def main() -> None:
    import torch

    record_golden.import_torchvision()
    import timm
    from timm.optim import param_groups_layer_decay

    sys.path.insert(0, str(record_golden.GOLDEN.parents[1]))
    from jaxft.models import create, names
    from jaxft.models.networks.vit import ViT

    arrays = {}
    for old, new in GRIDS:
        resized = timm.layers.resample_abs_pos_embed(torch.from_numpy(positions(old)), (new, new))
        arrays[f"positions_{old}_{new}"] = resized.numpy()
    groups = param_groups_layer_decay(
        module := timm.create_model("vit_tiny_patch16_224"), layer_decay=DECAY
    )
    by_id = {id(x): group["lr_scale"] for group in groups for x in group["params"]}
    scales = {n: by_id[id(x)] for n, x in module.named_parameters()}
    networks = {name: describe(name) for name in names() if create(name).module is ViT}
    arrays |= {key: json.dumps(x) for key, x in (("scales", scales), ("networks", networks))}
    np.savez_compressed(GOLDEN, **arrays)
    print(len(networks), GOLDEN.stat().st_size)


if __name__ == "__main__":
    main()
