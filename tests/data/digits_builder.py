"""scikit-learn's digits as the TFDS data set `tfds:sklearn_digits`, which needs no download.

TFDS registers the data set when this module is imported.
"""

import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from jaxft.data import digits


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """One split, train: the 1,797 digits as grey 8x8 PNG files, in the order of `digits.read`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        classes = [str(digit) for digit in range(10)]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, from sklearn.datasets.load_digits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=classes),
                }
            ),
            supervised_keys=("image", "label"),
            # Keeps the order, so that a seed selects the same images as with `digits`.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        source = digits.read("0-9")
        for index, (pixels, target) in enumerate(zip(source.images, source.targets, strict=True)):
            png = io.BytesIO()
            Image.fromarray(pixels[..., 0]).save(png, "png")
            # TFDS would encode an array with TensorFlow, but stores bytes as they are.
            yield index, {"image": png.getvalue(), "label": int(target)}
