"""From a file to RGB pixels, as torchvision's `ImageFolder` reads them: `convert("RGB")`."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from jaxft.errors import DataError

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: Pillow's own first limit, a quarter of a gibibyte of RGB."""


def decode(file: Path | bytes, *, reduce_to: int | None = None) -> Image.Image:
    """The RGB image in a file, or in a file's bytes; pixel for pixel `open(...).convert("RGB")`.

    What Pillow makes of other modes is therefore what training sees: alpha is dropped, not
    blended; grey levels of 16 bits are clipped at 255, not scaled (such files come out white:
    convert them first); CMYK is converted without its profile; of an animation the first frame
    counts. EXIF rotation is ignored, as by torchvision's loader.

    With `reduce_to`, a JPEG is decoded at half, a quarter or an eighth of its size, as far as no
    side gets shorter than `reduce_to`. That reads every byte of the file in less time, but
    libjpeg's reduced pixels are not those of decoding and then resizing by any of Pillow's filters
    (over 40 photographs 3 to 5 levels apart on average, none equal): for checks and thumbnails,
    never for training.

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
            image.load()
            # Only of interest to those who keep alpha; Pillow warns when it cannot be kept.
            image.info.pop("transparency", None)
            # `convert` of an RGB image is a copy, an eighth of the time that decoding takes.
            return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("the image")) from error
    except Exception as error:  # decoders raise anything, from OSError to struct.error
        raise DataError(_reason(error)) from error


def _too_large(what: str) -> str:
    return f"{what} exceeds what is safe to decode ({MAX_PIXELS:,} pixels): scale it down"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    # An OSError's own text repeats the path.
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
