"""Decodes image files to RGB, as torchvision's `ImageFolder` does: `convert("RGB")`.

Pillow decodes JPEGs with libjpeg-turbo. Other bindings to it, such as simplejpeg and OpenCV, return
equal pixels (except for CMYK), but are not faster by more than a few per cent.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxft.errors import DataError

# Formats whose extra images are previews or layers of the first.
_MULTIPART_FORMATS = ("MPO", "PSD")

MAX_PIXELS = 89_478_485
"""Maximum number of pixels: Pillow's default, a quarter of a GiB of RGB."""


def decode(file: Path | bytes, *, reduce_to: int | None = None) -> Image.Image:
    """Decodes an image file as `Image.open(file).convert("RGB")`, with equal pixels.

    The exception is grey images with more than 8 bits, whose levels Pillow clips at 255. 16-bit
    levels are divided by 257 instead. If the range of the levels is unknown (floats, or 32-bit
    integers that do not clearly hold 16-bit levels), raises an error.

    As in Pillow, alpha is dropped, 16-bit colours keep their upper 8 bits, CMYK is converted
    without its profile, and only the first frame or page is read. As in torchvision, EXIF
    orientation is ignored.

    Args:
      file: path or content of the file.
      reduce_to: decode a JPEG at 1/2, 1/4 or 1/8 of its size, with no side shorter than this, and
        warn if a file holds several images. Faster, and still reads every byte, but the pixels
        differ from a resized image (by 3 to 5 levels on average over 40 photographs): for checks
        and thumbnails only, never for training.

    Raises:
      DataError: the file is not an image, is damaged, or has more than `MAX_PIXELS` pixels, which
        is checked before decoding. The message does not include the path.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(_too_large(f"{image.width}x{image.height} pixels"))
            if reduce_to is not None:
                image.draft(None, (reduce_to, reduce_to))
                if getattr(image, "is_animated", False) and image.format not in _MULTIPART_FORMATS:
                    warnings.warn("holds several images, of which the first is used", stacklevel=1)
            image.load()
            # `convert` warns about transparency that it cannot keep.
            image.info.pop("transparency", None)
            if image.mode == "F" or image.mode.startswith("I"):
                return _to_8_bits(image).convert("RGB")
            # `convert` would copy an RGB image, which takes an eighth of the decoding time.
            return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("the image")) from error
    except Exception as error:  # decoders raise many types, from OSError to struct.error
        raise DataError(_reason(error, file)) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales grey levels from 0..65535 to 0..255, rounded to the nearest."""
    hint = "whose range is unknown: save them with 8 or 16 bits"
    if image.mode == "F":
        raise DataError(f"grey levels are floats, {hint}")
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    # Pillow scales PNG and PPM to 16 bits. In other formats, small levels may mean 8 bits.
    is_16_bit = image.mode != "I" or image.format in ("PNG", "PPM") or high > 255
    if low < 0 or high > 65535 or not is_16_bit:
        raise DataError(f"grey levels are {low} to {high}, integers of 32 bits, {hint}")
    return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _too_large(size: str) -> str:
    return f"{size} exceeds the size that is safe to decode ({MAX_PIXELS:,} pixels): scale it down"


def _reason(error: Exception, file: Path | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        return "not an image" if size else "the file is empty"
    # str(OSError) would repeat the path.
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
