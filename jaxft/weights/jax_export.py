"""Exports a network with its weights as one `jax.export` program that runs without jaxft."""

import calendar
from datetime import UTC, date, datetime

import jax
import numpy as np
from jax import export

from jaxft.data import Preprocessing
from jaxft.errors import ModelError
from jaxft.models.model import Model, Tree

PLATFORMS = ("cpu", "cuda", "tpu")
_MONTHS = 6  # of compatibility, as jax guarantees


def lifetime(today: date | None = None) -> dict[str, str]:
    """Returns the jax version and date of an export, and until when newer versions can run it.

    jax guarantees that an exported program runs in versions up to 6 months newer:
    https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees.
    """
    today = today or datetime.now(UTC).date()
    year, month = divmod(today.year * 12 + today.month - 1 + _MONTHS, 12)
    last = calendar.monthrange(year, month + 1)[1]
    until = date(year, month + 1, min(today.day, last))
    return {"jax": jax.__version__, "written": str(today), "good_until": str(until)}


def serialize(
    model: Model,
    params: Tree,
    stats: Tree,
    preprocessing: Preprocessing,
    *,
    pixels: str = "uint8",
    platforms: tuple[str, ...] = PLATFORMS,
) -> bytes:
    """Exports the network in evaluation mode, with its weights, for several platforms.

    The program maps images `[b h w 3]` to float32 logits `[b k]`, for any batch size `b`. Norm
    layers use running statistics.

    Args:
      model: Network.
      params: Its parameters.
      stats: Its running statistics.
      preprocessing: Image size, mean and std.
      pixels: `"uint8"`: the program takes decoded RGB images, resized and cropped to
        `preprocessing.image_size`, and normalises them. `"float32"`: it takes normalised images.
      platforms: Platforms to compile for.

    Raises:
      ValueError: jax does not know a platform.
      ModelError: A user's module needs a static batch size.

    Example:
      program = jax.export.deserialize(path.read_bytes())
      logits = program.call(images)
    """

    def evaluate(images: jax.Array) -> jax.Array:
        return model.apply(params, stats, preprocessing.normalize(images), norms="running")[0]

    (b,) = export.symbolic_shape("b")
    size = preprocessing.image_size
    images = jax.ShapeDtypeStruct((b, size, size, 3), np.dtype(pixels))
    try:
        program = export.export(jax.jit(evaluate), platforms=platforms)(images)
    except TypeError as error:
        raise ModelError(
            f"{model.name} cannot be exported for batches of any size: {error}\nIn the module, "
            "take a batch's size as x.shape[0], not len(x), and do not convert it to an int."
        ) from error
    return bytes(program.serialize())
