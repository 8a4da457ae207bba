"""From a file to RGB pixels, as torchvision's `ImageFolder` reads them: `convert("RGB")`."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxft.errors import DataError

# Formats whose further images are previews or layers of the first.
_PARTS = ("MPO", "PSD")

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: Pillow's own first limit, a quarter of a gibibyte of RGB."""


def decode(file: Path | bytes, *, reduce_to: int | None = None) -> Image.Image:
    """Decodes the RGB image in a file, or in a file's bytes, as `open(...).convert("RGB")` does.

    Pixel for pixel, but for grey levels of more than 8 bits, which Pillow clips at 255: those of 16
    bits are divided by 257, 0..65535 to 0..255. Levels whose range a file does not tell are an
    error: floats, and integers of 32 bits that are not plainly of 16.

    Other modes are Pillow's: alpha and transparency are dropped, not blended; colours of 16 bits
    keep their upper 8; CMYK is converted without its profile. Of an animation or of many pages the
    first counts. EXIF orientation is not applied, as by torchvision's loader.

    With `reduce_to`, it also warns of a file that holds several images; and a JPEG is decoded at
    half, a quarter or an eighth of its size, as far as no side gets shorter than `reduce_to`. That
    reads every byte of the file in less time, but libjpeg's reduced pixels are not those of
    decoding and then resizing by any of Pillow's filters (over 40 photographs 3 to 5 levels apart
    on average, none equal): for checks and thumbnails, never for training.

    Raises:
      DataError: not an image, a broken one, or more than `MAX_PIXELS` pixels, which is refused
        before any is decoded. It says why but not where: the caller knows the file's place.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(_too_large(f"{image.width}x{image.height} pixels"))
            if reduce_to is not None:
                image.draft(None, (reduce_to, reduce_to))
                if getattr(image, "is_animated", False) and image.format not in _PARTS:
                    warnings.warn("holds several images, of which the first is used", stacklevel=1)
            image.load()
            # Only of interest to those who keep alpha; Pillow warns when it cannot be kept.
            image.info.pop("transparency", None)
            if image.mode == "F" or image.mode.startswith("I"):
                return _in_eight_bits(image).convert("RGB")
            # `convert` of an RGB image is a copy, an eighth of the time that decoding takes.
            return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("the image")) from error
    except Exception as error:  # decoders raise anything, from OSError to struct.error
        raise DataError(_reason(error, file)) from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey levels of 0..65535 to 0..255, rounded to the nearest."""
    advice = "whose range is unknown: save them with 8 or 16 bits"
    if image.mode == "F":
        raise DataError(f"grey levels are floats, {advice}")
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    # Of PNG and PPM Pillow scales the levels to 16 bits itself. Others may have 8.
    known = image.mode != "I" or image.format in ("PNG", "PPM") or high > 255
    if low < 0 or high > 65535 or not known:
        raise DataError(f"grey levels are {low} to {high}, integers of 32 bits, {advice}")
    return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _too_large(what: str) -> str:
    return f"{what} exceeds what is safe to decode ({MAX_PIXELS:,} pixels): scale it down"


def _reason(error: Exception, file: Path | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        return "not an image" if size else "the file is empty"
    # An OSError's own text repeats the path.
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
