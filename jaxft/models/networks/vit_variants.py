"""The vision transformers by timm's names: ViT, DeiT, DINOv2, CLIP, SigLIP and others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.networks.vit import ViT, ViTConfig
from jaxft.models.registry import register
from jaxft.models.resize_pos_embed import resize_pos_embed

_LAYER = r"(?:\w+\.)?encoder\.layer\.(\d+)\."
_RENAMES = (
    # ViT and DINOv2 of transformers, such as google/vit-base-patch16-224 and facebook/dinov2-base.
    Rename(
        _LAYER + r"attention\.attention\.(?P<part>query|key|value)\.(\w+)",
        "blocks.{0}.attn.qkv.{2}",
        parts=("query", "key", "value"),
    ),
    Rename(_LAYER + r"attention\.output\.dense\.(\w+)", "blocks.{0}.attn.proj.{1}"),
    Rename(_LAYER + r"layernorm_before\.(\w+)", "blocks.{0}.norm1.{1}"),
    Rename(_LAYER + r"layernorm_after\.(\w+)", "blocks.{0}.norm2.{1}"),
    Rename(_LAYER + r"intermediate\.dense\.(\w+)", "blocks.{0}.mlp.fc1.{1}"),
    Rename(_LAYER + r"output\.dense\.(\w+)", "blocks.{0}.mlp.fc2.{1}"),
    Rename(_LAYER + r"(norm[12]|mlp\.fc[12])\.(\w+)", "blocks.{0}.{1}.{2}"),
    Rename(_LAYER + r"layer_scale([12])\.lambda1", "blocks.{0}.ls{1}.gamma"),
    Rename(r"(?:\w+\.)?embeddings\.cls_token", "cls_token"),
    Rename(r"(?:\w+\.)?embeddings\.register_tokens", "reg_token"),
    Rename(r"(?:\w+\.)?embeddings\.position_embeddings", "pos_embed"),
    Rename(r"(?:\w+\.)?embeddings\.patch_embeddings\.projection\.(\w+)", "patch_embed.proj.{0}"),
    Rename(r"(?:\w+\.)?layernorm\.(\w+)", "norm.{0}"),
    # A common name of a last layer.
    Rename(r"classifier\.(weight|bias)", "head.{0}"),
    # DeiT III and DINOv2 as Facebook published them.
    Rename(r"blocks\.(\d+)\.gamma_([12])", "blocks.{0}.ls{1}.gamma"),
    Rename(r"register_tokens", "reg_token"),
)
# The mask token of DINOv2 and the pooler of transformers, which classification does not use.
_IGNORED = (r"(?:\w+\.)*mask_token", r"(?:\w+\.)*pooler\.dense\.(?:weight|bias)")


def merge_class_position(tensors: dict[str, Any]) -> dict[str, Any]:
    """Adds the position embedding of the class token, if there is one, to that token.

    timm's files of DINOv2 with registers have the sum; the original files have both.
    """
    token, positions = tensors.get("cls_token"), tensors.get("pos_embed")
    if token is None or positions is None or len(positions.shape) != 3:
        return tensors
    _, n, c = positions.shape
    if n == 1 or math.isqrt(n - 1) ** 2 != n - 1:
        return tensors
    return tensors | {
        "cls_token": replace(token, read=lambda: token.read() + positions.read()[:, :1]),
        "pos_embed": replace(positions, shape=(1, n - 1, c), read=lambda: positions.read()[:, 1:]),
    }


@cache
def key_map(num_prefix_tokens: int, *, embed_prefix: bool) -> KeyMap:
    """Returns the key map of networks with this number of class and register tokens."""
    count = num_prefix_tokens if embed_prefix else 0
    resize = partial(resize_pos_embed, num_prefix_tokens=count)
    convert = None if embed_prefix else merge_class_position
    return KeyMap(_RENAMES, _IGNORED, convert, {"pos_embed": resize})


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "wee": {"width": 256, "depth": 14, "num_heads": 4, "mlp_ratio": 5},
    "xsmall": {"width": 256, "depth": 10, "num_heads": 4},
    "little": {"width": 320, "depth": 14, "num_heads": 5, "mlp_ratio": 5.6},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "medium": {"width": 512, "depth": 12, "num_heads": 8},
    "mediumd": {"width": 512, "depth": 20, "num_heads": 8},
    "betwixt": {"width": 640, "depth": 12, "num_heads": 10},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "so400m": {"width": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "huge": {"width": 1280, "depth": 32, "num_heads": 16},
    "giant": {"width": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "giantopt": {"width": 1536, "depth": 40, "num_heads": 16},
    "gigantic": {"width": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = Preprocessing().mean, Preprocessing().std
_INCEPTION = _HALF, _HALF
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Family:
    """Networks with the same options; their names differ in size, patch size and image size.

    Attributes:
      pattern: pattern of the names.
      sizes: image sizes by size and patch size, such as `{"base 16": (224, 384)}`.
      options: options of `ViTConfig`.
      mean_and_std: mean and standard deviation of the channels.
      crop: fraction of the scaled image that the centre crop keeps, by image size or by size, patch
        size and image size; 1 for others.
      squash: image sizes, as in `crop`, of networks whose images are scaled to a square.
    """

    pattern: str
    sizes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    mean_and_std: tuple[tuple[float, float, float], tuple[float, float, float]] = _INCEPTION
    crop: Mapping[int | str, float] = field(default_factory=dict)
    squash: tuple[int | str, ...] = ()

    def register(self) -> None:
        """Registers the networks."""
        mean, std = self.mean_and_std
        for key, image_sizes in self.sizes.items():
            size, patch = key.split()
            for image in image_sizes:
                options = {**_SIZES[size], **self.options}
                config = ViTConfig(image_size=image, patch_size=int(patch), **options)
                exact = f"{key} {image}"
                crop = self.crop.get(exact, self.crop.get(image, 1))
                preprocessing = Preprocessing(
                    image_size=image,
                    resize_size=math.floor(image / crop),
                    resize_mode="squash" if {exact, image} & {*self.squash} else "short_side",
                    interpolation="bicubic",
                    mean=mean,
                    std=std,
                )
                register(
                    self.pattern.format(size=size, patch=patch, image=image),
                    ViT,
                    config,
                    key_map=key_map(config.num_prefix_tokens, embed_prefix=config.embed_prefix),
                    preprocessing=preprocessing,
                    torch_library="timm",
                )


_DINOV2 = {"layer_scale": 1e-5}
_CLIP_OPTIONS = {"pre_norm": True, "eps": 1e-5}
_GAP = {"class_token": False, "pool": "avg"}
_MAP = {"class_token": False, "pool": "map"}
_NORM_AFTER_POOLING = {**_GAP, "layer_scale": 1e-5, "embed_prefix": False, "fc_norm": True}
_TANH = {"activation": "gelu_tanh"}
_DINOV2_SIZES = {"small 14": (518,), "base 14": (518,), "large 14": (518,)}
_SIGLIP_SIZES = {"base 16": (224, 256, 384, 512), "large 16": (256, 384)}
_SIGLIP_TANH_SIZES = {
    "base 32": (256,), "large 16": (512,), "so400m 16": (256, 384, 512), "giantopt 16": (256, 384),
}  # fmt: skip
_SIGLIP_CROP: dict[int | str, float] = dict.fromkeys((224, 256, 378, 384, 512), 0.9)

_FAMILIES = (
    _Family(
        "vit_{size}_patch{patch}_{image}",
        {
            "tiny 16": (224, 384), "small 32": (224, 384), "small 16": (224, 384),
            "base 32": (224, 384), "base 16": (224, 384), "base 8": (224,),
            "large 32": (224, 384), "large 16": (224, 384), "large 14": (224,),
            "huge 14": (224,), "giant 14": (224,), "gigantic 14": (224,),
        },
        crop={224: 0.9},
    ),
    _Family("vit_{size}_patch{patch}_{image}", {"small 8": (224,)}, {}, _IMAGENET, {224: 0.9}),
    _Family(
        "deit_{size}_patch{patch}_{image}",
        {"tiny 16": (224,), "small 16": (224,), "base 16": (224, 384)},
        {}, _IMAGENET, {224: 0.9},
    ),
    _Family(
        "deit3_{size}_patch{patch}_{image}",
        {
            "small 16": (224, 384), "medium 16": (224,), "base 16": (224, 384),
            "large 16": (224, 384), "huge 14": (224,),
        },
        {"embed_prefix": False, "layer_scale": 1e-6}, _IMAGENET, {224: 0.9},
    ),
    _Family("vit_{size}_patch{patch}_dinov2", _DINOV2_SIZES, _DINOV2, _IMAGENET),
    _Family(
        "vit_{size}_patch{patch}_reg4_dinov2",
        _DINOV2_SIZES, {**_DINOV2, "embed_prefix": False, "num_registers": 4}, _IMAGENET,
    ),
    _Family(
        "vit_{size}_patch{patch}_clip_{image}",
        {
            "xsmall 16": (224,), "medium 32": (224,), "medium 16": (224,), "betwixt 32": (224,),
            "base 32": (224, 256, 384, 448), "base 16": (224, 384),
            "huge 14": (224, 336, 378), "giant 14": (224,), "gigantic 14": (224, 378),
        },
        _CLIP_OPTIONS, _CLIP,
        {
            "xsmall 16 224": 0.9, "medium 32 224": 0.9, "medium 16 224": 0.9,
            "betwixt 32 224": 0.9, "base 32 224": 0.9, "base 16 224": 0.95,
        },
        squash=("base 16 384", 336, "gigantic 14 378"),
    ),
    _Family(
        "vit_{size}_patch{patch}_clip_{image}",
        {"large 14": (224, 336)}, _CLIP_OPTIONS, squash=(336,),
    ),
    _Family(
        "vit_{size}_patch{patch}_clip_quickgelu_{image}",
        {
            "base 32": (224,), "base 16": (224,), "large 14": (224, 336), "huge 14": (224, 378),
            "gigantic 14": (224,),
        },
        {**_CLIP_OPTIONS, "activation": "quick_gelu"}, _CLIP, {"base 32 224": 0.9},
    ),
    _Family(
        "vit_{size}_patch{patch}_siglip_{image}",
        {**_SIGLIP_SIZES, "so400m 14": (224, 378)}, _MAP, crop=_SIGLIP_CROP,
    ),
    _Family(
        "vit_{size}_patch{patch}_siglip_{image}",
        _SIGLIP_TANH_SIZES, _MAP | _TANH, crop=_SIGLIP_CROP,
    ),
    _Family(
        "vit_{size}_patch{patch}_siglip_gap_{image}",
        {**_SIGLIP_SIZES, "so400m 14": (224, 378, 448, 896)}, _GAP, crop=_SIGLIP_CROP,
    ),
    _Family(
        "vit_{size}_patch{patch}_siglip_gap_{image}",
        _SIGLIP_TANH_SIZES, _GAP | _TANH, crop=_SIGLIP_CROP,
    ),
    _Family(
        "vit_{size}_patch{patch}_gap_{image}",
        {"medium 16": (240, 256, 384), "betwixt 16": (256,)},
        {**_GAP, "qkv_bias": False, "layer_scale": 1e-6},
        crop={240: 0.95, 256: 0.95, 384: 0.95}, squash=(384,),
    ),
    _Family(
        "vit_{size}_patch{patch}_reg1_gap_{image}",
        {"wee 16": (256,), "little 16": (256,), "medium 16": (256,), "betwixt 16": (256,)},
        {**_NORM_AFTER_POOLING, "num_registers": 1}, crop={256: 0.95},
    ),
    _Family(
        "vit_{size}_patch{patch}_reg4_gap_{image}",
        {
            "little 16": (256,), "medium 16": (256,), "mediumd 16": (256, 384),
            "betwixt 16": (256, 384),
        },
        {**_NORM_AFTER_POOLING, "num_registers": 4}, crop={256: 0.95},
    ),
)  # fmt: skip

for _family in _FAMILIES:
    _family.register()
