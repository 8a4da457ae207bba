"""Files to RGB: pixel for pixel as torchvision's `ImageFolder` and its transforms of evaluation."""

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


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return saved(sample(37, 53), "JPEG", exif=exif)


def alpha() -> Image.Image:
    image = sample(37, 53)
    image.putalpha(image.getchannel("R"))
    return image


# Made when asked for: a name, and the bytes of a file of that kind.
FILES = {
    "jpeg": lambda: saved(sample(37, 53), "JPEG"),
    "jpeg, odd, large": lambda: saved(sample(301, 217), "JPEG", quality=40),
    "jpeg, progressive": lambda: saved(sample(53, 37), "JPEG", progressive=True),
    "jpeg, one pixel": lambda: saved(sample(1, 1), "JPEG"),
    "jpeg, gray": lambda: saved(sample(37, 53).convert("L"), "JPEG"),
    "jpeg, cmyk": lambda: saved(sample(37, 53).convert("CMYK"), "JPEG"),
    "jpeg, rotated by exif": rotated,
    "png": lambda: saved(sample(37, 53), "PNG"),
    "png, alpha": lambda: saved(alpha(), "PNG"),
    "png, gray and alpha": lambda: saved(alpha().convert("LA"), "PNG"),
    "png, gray": lambda: saved(sample(37, 53).convert("L"), "PNG"),
    "png, black and white": lambda: saved(sample(37, 53).convert("1"), "PNG"),
    "png, palette": lambda: saved(palette(), "PNG"),
    "png, palette, one clear": lambda: saved(palette(), "PNG", transparency=3),
    "png, palette, alpha": lambda: saved(palette(), "PNG", transparency=bytes(range(0, 160, 10))),
    "png, one colour clear": lambda: saved(sample(37, 53), "PNG", transparency=(0, 1, 2)),
    "tiff, cmyk": lambda: saved(sample(37, 53).convert("CMYK"), "TIFF"),
    "webp, alpha": lambda: saved(alpha(), "WEBP", lossless=True),
    "bmp": lambda: saved(sample(37, 53), "BMP"),
    "gif, palette, one clear": lambda: saved(palette(), "GIF", transparency=3),
    "gif, moving": lambda: saved(palette(), "GIF", save_all=True, append_images=[sample(37, 53)]),
}


def ours(name):
    image = decode(FILES[name]())
    return image, eval_view(image, SMALL)


def torchvisions(name, folder):
    tv = torchvision_transforms()
    from torchvision.datasets.folder import default_loader

    path = folder / "file"
    path.write_bytes(FILES[name]())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        image = default_loader(path)
    return image, tv.Compose([tv.Resize(28), tv.CenterCrop(24)])(image)


@pytest.mark.parametrize("name", FILES)
def test_files_equal_torchvisions_recorded(name):
    image, view = ours(name)
    assert image.mode == "RGB"
    assert digest(image, view) == recorded("transforms_decode.npz")[name]


@pytest.mark.parametrize("name", FILES)
def test_files_equal_torchvisions_live(name, tmp_path):
    for a, b in zip(ours(name), torchvisions(name, tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


# Levels of more than 8 bits, which torchvision's loader clips.

LEVELS = np.array([[0, 1, 128, 129], [256, 257, 385, 386], [40000, 65406, 65407, 65535]])
SCALED = [[0, 0, 0, 1], [1, 1, 1, 2], [156, 254, 255, 255]]


def gray(dtype, kind="TIFF", levels=LEVELS) -> bytes:
    return saved(Image.fromarray(levels.astype(dtype)), kind)


DEEP = {
    "png": lambda: gray(np.uint16, "PNG"),
    "tiff": lambda: gray(np.uint16),
    "tiff, big-endian": lambda: gray(">u2"),
    "tiff, 32 bit": lambda: gray(np.int32),
    "pgm": lambda: b"P5 4 3 65535\n" + LEVELS.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_of_16_bits_is_scaled_to_8(name):
    image = decode(DEEP[name]())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.stack([SCALED] * 3, -1))


def test_grey_of_16_bits_equals_the_same_in_8():
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
def test_grey_of_an_unknown_range_is_refused(dtype, levels, message):
    with pytest.raises(DataError, match=message):
        decode(gray(dtype, levels=levels))


def test_a_path_is_read_as_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(FILES["jpeg"]())
    np.testing.assert_array_equal(decode(tmp_path / "file"), decode(FILES["jpeg"]()))


def test_exif_rotation_is_ignored():
    np.testing.assert_array_equal(decode(rotated()), decode(FILES["jpeg"]()))


def test_reduced_size_is_for_checks_only():
    file = FILES["jpeg, odd, large"]()
    assert decode(file).size == (217, 301)
    assert {side: decode(file, reduce_to=side).size for side in (1, 28, 60, 200)} == {
        1: (28, 38), 28: (55, 76), 60: (109, 151), 200: (217, 301),
    }  # fmt: skip
    exact = decode(file).resize((28, 38), Image.Resampling.BOX)
    assert not np.array_equal(decode(file, reduce_to=1), exact)
    assert decode(FILES["png"](), reduce_to=1).size == (53, 37)  # other formats have no such thing


# Photographs.


def photographs():
    files = sorted((HYMENOPTERA / "val").glob("*/*"))
    if not files:
        pytest.skip("the photographs are not here")
    assert len(files) == 153
    return files


def torchvisions_photographs():
    tv = torchvision_transforms()
    from torchvision.datasets.folder import default_loader

    transform = tv.Compose([tv.Resize(256), tv.CenterCrop(224)])
    return [transform(default_loader(file)) for file in photographs()]


def test_photographs_equal_torchvisions_recorded():
    views = [eval_view(decode(file), Preprocessing()) for file in photographs()]
    assert digest(*views) == recorded("transforms_decode.npz")["photographs"]


@pytest.mark.slow
def test_photographs_equal_torchvisions_live():
    for file, expected in zip(photographs(), torchvisions_photographs(), strict=True):
        view = eval_view(decode(file), Preprocessing())
        np.testing.assert_array_equal(view, expected, err_msg=str(file))


# What cannot be decoded.


def empty_png(width, height) -> bytes:
    """A few bytes that promise many pixels."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BROKEN = {
    "no image": (b"hello", "not an image"),
    "nothing": (b"", "the file is empty"),
    "cut off": (FILES["jpeg, odd, large"]()[:3000], "truncated"),
    "20,000 x 20,000": (empty_png(20_000, 20_000), "exceeds what is safe.*scale it down"),
    "10,000 x 10,000": (empty_png(10_000, 10_000), "exceeds what is safe.*scale it down"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_what_cannot_be_decoded(case, warned):
    file, message = BROKEN[case]
    with warnings.catch_warnings():
        warnings.simplefilter(warned)  # Pillow only warns of some sizes
        with pytest.raises(DataError, match=message):
            decode(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file or directory"):
        decode(tmp_path / "missing.jpg")
