"""Decoding: pixels equal torchvision's `ImageFolder`, alone and with its evaluation transforms."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from reference import HYMENOPTERA, digest, recorded, sample, torchvision_transforms

from jaxft.data import Preprocessing
from jaxft.data.decode import decode
from jaxft.data.preprocessing import eval_view
from jaxft.errors import DataError

SMALL = Preprocessing(image_size=24, resize_size=28)


def palette() -> Image.Image:
    return sample(37, 53).quantize(16)


def encode(image, image_format, **options) -> bytes:
    """Returns the content of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encode(sample(37, 53), "JPEG", exif=exif)


def alpha() -> Image.Image:
    image = sample(37, 53)
    image.putalpha(image.getchannel("R"))
    return image


# Functions that return the content of a file.
FILES = {
    "jpeg": lambda: encode(sample(37, 53), "JPEG"),
    "jpeg, odd, large": lambda: encode(sample(301, 217), "JPEG", quality=40),
    "jpeg, progressive": lambda: encode(sample(53, 37), "JPEG", progressive=True),
    "jpeg, one pixel": lambda: encode(sample(1, 1), "JPEG"),
    "jpeg, gray": lambda: encode(sample(37, 53).convert("L"), "JPEG"),
    "jpeg, cmyk": lambda: encode(sample(37, 53).convert("CMYK"), "JPEG"),
    "jpeg, rotated by exif": rotated,
    "png": lambda: encode(sample(37, 53), "PNG"),
    "png, alpha": lambda: encode(alpha(), "PNG"),
    "png, gray and alpha": lambda: encode(alpha().convert("LA"), "PNG"),
    "png, gray": lambda: encode(sample(37, 53).convert("L"), "PNG"),
    "png, black and white": lambda: encode(sample(37, 53).convert("1"), "PNG"),
    "png, palette": lambda: encode(palette(), "PNG"),
    "png, palette, one clear": lambda: encode(palette(), "PNG", transparency=3),
    "png, palette, alpha": lambda: encode(palette(), "PNG", transparency=bytes(range(0, 160, 10))),
    "png, one colour clear": lambda: encode(sample(37, 53), "PNG", transparency=(0, 1, 2)),
    "tiff, cmyk": lambda: encode(sample(37, 53).convert("CMYK"), "TIFF"),
    "webp, alpha": lambda: encode(alpha(), "WEBP", lossless=True),
    "bmp": lambda: encode(sample(37, 53), "BMP"),
    "gif, palette, one clear": lambda: encode(palette(), "GIF", transparency=3),
    "gif, moving": lambda: encode(palette(), "GIF", save_all=True, append_images=[sample(37, 53)]),
}


def our_views(name):
    """Returns the decoded file and its evaluation view."""
    image = decode(FILES[name]())
    return image, eval_view(image, SMALL)


def torchvision_views(name, folder):
    """Returns the same as `our_views`, by torchvision."""
    tv = torchvision_transforms()
    from torchvision.datasets.folder import default_loader

    path = folder / "file"
    path.write_bytes(FILES[name]())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        image = default_loader(path)
    return image, tv.Compose([tv.Resize(28), tv.CenterCrop(24)])(image)


@pytest.mark.parametrize("name", FILES)
def test_decode_equals_torchvision_recorded(name):
    image, view = our_views(name)
    assert image.mode == "RGB"
    assert digest(image, view) == recorded("transforms_decode.npz")[name]


@pytest.mark.parametrize("name", FILES)
def test_decode_equals_torchvision_live(name, tmp_path):
    for actual, expected in zip(our_views(name), torchvision_views(name, tmp_path), strict=True):
        np.testing.assert_array_equal(actual, expected)


# Grey images with more than 8 bits, which torchvision's loader clips.

LEVELS = np.array([[0, 1, 128, 129], [256, 257, 385, 386], [40000, 65406, 65407, 65535]])
SCALED = [[0, 0, 0, 1], [1, 1, 1, 2], [156, 254, 255, 255]]


def gray(dtype, image_format="TIFF", levels=LEVELS) -> bytes:
    return encode(Image.fromarray(levels.astype(dtype)), image_format)


GRAY_16_BIT = {
    "png": lambda: gray(np.uint16, "PNG"),
    "tiff": lambda: gray(np.uint16),
    "tiff, big-endian": lambda: gray(">u2"),
    "tiff, 32 bit": lambda: gray(np.int32),
    "pgm": lambda: b"P5 4 3 65535\n" + LEVELS.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", GRAY_16_BIT)
def test_decode_scales_16_bit_gray_to_8_bits(name):
    image = decode(GRAY_16_BIT[name]())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.stack([SCALED] * 3, -1))


def test_decode_16_bit_gray_equals_8_bit_gray():
    levels = np.arange(256).reshape(16, 16)
    pixels = [
        np.asarray(decode(gray(dtype, "PNG", factor * levels)))
        for dtype, factor in ((np.uint8, 1), (np.uint16, 257))
    ]
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize(
    ("dtype", "levels", "message"),
    [
        (np.float32, LEVELS / 65535, "grey levels are floats, whose range is unknown: save them"),
        (np.int32, LEVELS + 1, "grey levels are 1 to 65536, integers of 32 bits, whose range"),
        (np.int32, LEVELS - 1, "grey levels are -1 to 65534, integers of 32 bits"),
        (np.int32, LEVELS % 256, "grey levels are 0 to 255, integers of 32 bits"),
    ],
)
def test_decode_refuses_gray_of_unknown_range(dtype, levels, message):
    with pytest.raises(DataError, match=message):
        decode(gray(dtype, levels=levels))


def test_decode_path_equals_bytes(tmp_path):
    (tmp_path / "file").write_bytes(FILES["jpeg"]())
    np.testing.assert_array_equal(decode(tmp_path / "file"), decode(FILES["jpeg"]()))


def test_decode_ignores_exif_orientation():
    np.testing.assert_array_equal(decode(rotated()), decode(FILES["jpeg"]()))


def test_decode_reduce_to():
    file = FILES["jpeg, odd, large"]()
    assert decode(file).size == (217, 301)
    assert {side: decode(file, reduce_to=side).size for side in (1, 28, 60, 200)} == {
        1: (28, 38), 28: (55, 76), 60: (109, 151), 200: (217, 301),
    }  # fmt: skip
    exact = decode(file).resize((28, 38), Image.Resampling.BOX)
    assert not np.array_equal(decode(file, reduce_to=1), exact)
    assert decode(FILES["png"](), reduce_to=1).size == (53, 37)  # JPEG only


# Photographs.


def photographs():
    files = sorted((HYMENOPTERA / "val").glob("*/*"))
    if not files:
        pytest.skip("needs the hymenoptera photographs")
    assert len(files) == 153
    return files


def torchvision_photographs():
    tv = torchvision_transforms()
    from torchvision.datasets.folder import default_loader

    transform = tv.Compose([tv.Resize(256), tv.CenterCrop(224)])
    return [transform(default_loader(file)) for file in photographs()]


def test_decode_photographs_equals_torchvision_recorded():
    views = [eval_view(decode(file), Preprocessing()) for file in photographs()]
    assert digest(*views) == recorded("transforms_decode.npz")["photographs"]


@pytest.mark.slow
def test_decode_photographs_equals_torchvision_live():
    for file, expected in zip(photographs(), torchvision_photographs(), strict=True):
        view = eval_view(decode(file), Preprocessing())
        np.testing.assert_array_equal(view, expected, err_msg=str(file))


# Errors.


def empty_png(width, height) -> bytes:
    """Returns a PNG file with a header for many pixels, and no pixels."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BROKEN = {
    "no image": (b"hello", "not an image"),
    "nothing": (b"", "the file is empty"),
    "cut off": (FILES["jpeg, odd, large"]()[:3000], "truncated"),
    "20,000 x 20,000": (empty_png(20_000, 20_000), "exceeds the size that is safe.*scale it down"),
    "10,000 x 10,000": (empty_png(10_000, 10_000), "exceeds the size that is safe.*scale it down"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("warning_filter", ["error", "ignore"])
def test_decode_error(case, warning_filter):
    file, message = BROKEN[case]
    with warnings.catch_warnings():
        warnings.simplefilter(warning_filter)  # for some sizes, Pillow only warns
        with pytest.raises(DataError, match=message):
            decode(file)


def test_decode_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file or directory"):
        decode(tmp_path / "missing.jpg")
