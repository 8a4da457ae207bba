"""The ConvNeXts by timm's names."""

from dataclasses import replace

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.networks.convnext import ConvNeXt, ConvNeXtConfig
from jaxft.models.registry import register


def _torchvision_stage(i: int) -> tuple[Rename, ...]:
    block, downsample = rf"features\.{2 * i + 1}\.(\d+)\.", rf"features\.{2 * i}\.([01])\.(\w+)"
    layers = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
    return (
        *(
            Rename(rf"{block}block\.{number}\.(\w+)", f"stages.{i}.blocks.{{0}}.{layer}.{{1}}")
            for number, layer in layers.items()
        ),
        Rename(rf"{block}layer_scale", f"stages.{i}.blocks.{{0}}.gamma"),
        Rename(downsample, f"stages.{i}.downsample.{{0}}.{{1}}" if i else "stem.{0}.{1}"),
    )


_FACEBOOK = r"stages\.(\d+)\.(\d+)\."
_TRANSFORMERS = r"(?:convnext(?:v2)?\.)?"
_LAYER = rf"{_TRANSFORMERS}encoder\.stages\.(\d+)\.layers\.(\d+)\."

KEY_MAP = KeyMap(
    (
        # facebookresearch/ConvNeXt and ConvNeXt-V2.
        Rename(r"downsample_layers\.0\.(\d)\.(\w+)", "stem.{0}.{1}"),
        Rename(r"downsample_layers\.(\d)\.(\d)\.(\w+)", "stages.{0}.downsample.{1}.{2}"),
        Rename(rf"{_FACEBOOK}dwconv\.(\w+)", "stages.{0}.blocks.{1}.conv_dw.{2}"),
        Rename(rf"{_FACEBOOK}norm\.(\w+)", "stages.{0}.blocks.{1}.norm.{2}"),
        Rename(rf"{_FACEBOOK}pwconv(\d)\.(\w+)", "stages.{0}.blocks.{1}.mlp.fc{2}.{3}"),
        Rename(rf"{_FACEBOOK}grn\.gamma", "stages.{0}.blocks.{1}.mlp.grn.weight"),
        Rename(rf"{_FACEBOOK}grn\.beta", "stages.{0}.blocks.{1}.mlp.grn.bias"),
        Rename(rf"{_FACEBOOK}gamma", "stages.{0}.blocks.{1}.gamma"),
        Rename(r"norm\.(\w+)", "head.norm.{0}"),
        # transformers, such as facebook/convnext-tiny-224.
        Rename(rf"{_TRANSFORMERS}embeddings\.patch_embeddings\.(\w+)", "stem.0.{0}"),
        Rename(rf"{_TRANSFORMERS}embeddings\.layernorm\.(\w+)", "stem.1.{0}"),
        Rename(
            rf"{_TRANSFORMERS}encoder\.stages\.(\d+)\.downsampling_layer\.(\d)\.(\w+)",
            "stages.{0}.downsample.{1}.{2}",
        ),
        Rename(rf"{_LAYER}dwconv\.(\w+)", "stages.{0}.blocks.{1}.conv_dw.{2}"),
        Rename(rf"{_LAYER}layernorm\.(\w+)", "stages.{0}.blocks.{1}.norm.{2}"),
        Rename(rf"{_LAYER}pwconv(\d)\.(\w+)", "stages.{0}.blocks.{1}.mlp.fc{2}.{3}"),
        Rename(rf"{_LAYER}grn\.(\w+)", "stages.{0}.blocks.{1}.mlp.grn.{2}"),
        Rename(rf"{_LAYER}layer_scale_parameter", "stages.{0}.blocks.{1}.gamma"),
        Rename(rf"{_TRANSFORMERS}layernorm\.(\w+)", "head.norm.{0}"),
        # torchvision.
        *(rename for i in range(4) for rename in _torchvision_stage(i)),
        Rename(r"classifier\.0\.(\w+)", "head.norm.{0}"),
        Rename(r"(?:classifier|classifier\.2|head)\.(weight|bias)", "head.fc.{0}"),
    )
)

_SMALL, _LARGE = (3, 3, 9, 3), (3, 3, 27, 3)
_SIZES = {  # depths, width of the first stage
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": (_SMALL, 96),
    "small": (_LARGE, 96),
    "base": (_LARGE, 128),
    "large": (_LARGE, 192),
    "xlarge": (_LARGE, 256),
    "huge": (_LARGE, 352),
}
_CONV_MLP = {"atto", "femto", "pico", "nano"}
_OVERLAPPING_STEM = {"atto": 24, "femto": 24, "pico": 32, "nano": 80}


def _config(size: str) -> ConvNeXtConfig:
    depths, width = _SIZES[size]
    widths = tuple(width * 2**i for i in range(4))
    return ConvNeXtConfig(depths, widths, conv_mlp=size in _CONV_MLP)


_CONFIGS = {
    **{f"convnext_{size}": _config(size) for size in _SIZES if size != "huge"},
    **{
        f"convnext_{size}_ols": replace(_config(size), overlapping_stem=width)
        for size, width in _OVERLAPPING_STEM.items()
    },
    "convnext_tiny_hnf": replace(_config("tiny"), norm_before_pool=True, conv_mlp=True),
    **{
        f"convnextv2_{size}": replace(_config(size), global_response_norm=True)
        for size in _SIZES
        if size != "xlarge"
    },
}

# timm's default preprocessing: crops of 0.875, 0.95, or all of the image.
_NARROW = Preprocessing(interpolation="bicubic")
_WIDE = replace(_NARROW, resize_size=235)
_WHOLE = replace(_NARROW, image_size=384, resize_size=384, resize_mode="squash")
_PREPROCESSING = {
    **dict.fromkeys(("convnext_nano", "convnext_nano_ols", "convnext_pico_ols"), _WIDE),
    **dict.fromkeys(("convnext_tiny", "convnext_tiny_hnf", "convnext_small"), _WIDE),
    "convnextv2_huge": _WHOLE,
}

for _name, _network in _CONFIGS.items():
    _preprocessing = _PREPROCESSING.get(_name, _NARROW)
    register(
        _name,
        ConvNeXt,
        _network,
        key_map=KEY_MAP,
        preprocessing=_preprocessing,
        torch_library="timm",
    )
