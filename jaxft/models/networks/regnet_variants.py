"""The RegNets X and Y by timm's names; the weights of torchvision's RegNets load as well."""

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.networks.regnet import RegNet, RegNetConfig
from jaxft.models.registry import register

_TORCHVISION_BLOCK = r"trunk_output\.block(\d)\.block\d-(\d+)\."
_BLOCK = "s{0}.b{after1}."
KEY_MAP = KeyMap(
    (
        Rename(r"stem\.0\.(\w+)", "stem.conv.{0}"),
        Rename(r"stem\.1\.(\w+)", "stem.bn.{0}"),
        *(
            Rename(_TORCHVISION_BLOCK + rf"{theirs}\.(\w+)", _BLOCK + ours + ".{2}")
            for theirs, ours in {
                r"f\.a\.0": "conv1.conv",
                r"f\.a\.1": "conv1.bn",
                r"f\.b\.0": "conv2.conv",
                r"f\.b\.1": "conv2.bn",
                r"f\.se\.fc1": "se.fc1",
                r"f\.se\.fc2": "se.fc2",
                r"f\.c\.0": "conv3.conv",
                r"f\.c\.1": "conv3.bn",
                r"proj\.0": "downsample.conv",
                r"proj\.1": "downsample.bn",
            }.items()
        ),
        # Common names of a last layer.
        Rename(r"(?:fc|classifier)\.(weight|bias)", "head.fc.{0}"),
    )
)
"""Names of torchvision's RegNets."""

# name without "regnet": (depth, w0, wa, wm, group width, crop relative to the scaled image).
_NETWORKS = {
    "x_002": (13, 24, 36.44, 2.49, 8, 0.875),
    "x_004": (22, 24, 24.48, 2.54, 16, 0.875),
    "x_004_tv": (22, 24, 24.48, 2.54, 16, 0.965),
    "x_006": (16, 48, 36.97, 2.24, 24, 0.875),
    "x_008": (16, 56, 35.73, 2.28, 16, 0.965),
    "x_016": (18, 80, 34.01, 2.25, 24, 0.965),
    "x_032": (25, 88, 26.31, 2.25, 48, 0.965),
    "x_040": (23, 96, 38.65, 2.43, 40, 0.875),
    "x_064": (17, 184, 60.83, 2.07, 56, 0.875),
    "x_080": (23, 80, 49.56, 2.88, 120, 0.965),
    "x_120": (19, 168, 73.36, 2.37, 112, 0.875),
    "x_160": (22, 216, 55.59, 2.1, 128, 0.965),
    "x_320": (23, 320, 69.86, 2.0, 168, 0.965),
    "y_002": (13, 24, 36.44, 2.49, 8, 0.875),
    "y_004": (16, 48, 27.89, 2.09, 8, 0.965),
    "y_006": (15, 48, 32.54, 2.32, 16, 0.875),
    "y_008": (14, 56, 38.84, 2.4, 16, 0.875),
    "y_008_tv": (14, 56, 38.84, 2.4, 16, 0.965),
    "y_016": (27, 48, 20.71, 2.65, 24, 0.965),
    "y_032": (21, 80, 42.63, 2.66, 24, 0.95),
    "y_040": (22, 96, 31.41, 2.24, 64, 0.95),
    "y_064": (25, 112, 33.22, 2.27, 72, 0.95),
    "y_080": (17, 192, 76.82, 2.19, 56, 0.95),
    "y_080_tv": (17, 192, 76.82, 2.19, 56, 0.965),
    "y_120": (19, 168, 73.36, 2.37, 112, 0.95),
    "y_160": (18, 200, 106.23, 2.48, 112, 0.95),
    "y_320": (20, 232, 115.89, 2.53, 232, 0.965),
}
NAMES = tuple(f"regnet{name}" for name in _NETWORKS)

for _name, (_depth, _w0, _wa, _wm, _group_width, _crop_pct) in _NETWORKS.items():
    register(
        f"regnet{_name}",
        RegNet,
        RegNetConfig(
            depth=_depth,
            w0=_w0,
            wa=_wa,
            wm=_wm,
            group_width=_group_width,
            squeeze_excite=_name.startswith("y"),
            round_up=_name.endswith("_tv"),
        ),
        key_map=KEY_MAP,
        preprocessing=Preprocessing.timm(224, _crop_pct),
        torch_library="timm",
    )
