"""A network with its weights as one file that runs wherever jax does, jaxft or not."""

import calendar
from datetime import UTC, date, datetime

import jax
import numpy as np
from jax import export

from jaxft.data import Preprocessing
from jaxft.errors import ModelError
from jaxft.models.model import Model, Tree

PLATFORMS = ("cpu", "cuda", "tpu")
_MONTHS = 6  # of jax's promise


def lifetime(today: date | None = None) -> dict[str, str]:
    """Returns which jax writes a program today, and until when later ones are sure to run it.

    jax promises of an exported program that a jax up to 6 months newer than the one that exported
    it runs it: https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees.
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
    """The evaluation, from images as they are decoded to logits, compiled for any of `platforms`.

    The program takes uint8 images `[b h w 3]`, RGB, resized and cropped to
    `preprocessing.image_size`, normalises them and gives float32 logits `[b k]` with running
    statistics, for any `b`. With `pixels="float32"` it takes images that are normalised already.
    The weights are inside. To run it:

        program = jax.export.deserialize(path.read_bytes())
        logits = program.call(images)

    Raises ValueError for a platform that jax does not know, ModelError for a module that needs the
    batch's size as a number.
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
