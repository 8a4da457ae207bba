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


def gray16(dtype):
    """Levels around 255, where Pillow clips, and far above."""
    levels = np.asarray(sample(37, 53), dtype)[..., 0] * 2
    levels[:, 40:] += 5000
    return Image.fromarray(levels)


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
    "png, 16 bit": lambda: saved(gray16(np.uint16), "PNG"),
    "tiff, 16 bit": lambda: saved(gray16(np.uint16), "TIFF"),
    "tiff, 32 bit": lambda: saved(gray16(np.int32), "TIFF"),
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
    "nothing": (b"", "not an image"),
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
