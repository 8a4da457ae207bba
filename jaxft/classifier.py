"""Classifies images with trained weights, as `jaxft predict` and `jaxft evaluate` do."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import expit, softmax

from jaxft import data, models, weights
from jaxft.batch_sizes import batch_sizes
from jaxft.data import OnBadImage, Preprocessing, Source
from jaxft.data.arrays import Values, arrays
from jaxft.data.unlabelled import UnlabelledFiles, find_images
from jaxft.devices import Devices
from jaxft.errors import DataError, RecipeError, WeightsError
from jaxft.labels import Tree
from jaxft.matmul_precision import MatmulPrecision, with_precision
from jaxft.models import Model, user_factory
from jaxft.models.nnx_adapter import expected_preprocessing
from jaxft.progress import track
from jaxft.train.eval_step import Tta, image_views, mean_logits
from jaxft.weights.description import Description

Images = str | PathLike[str] | Sequence[str | PathLike[str]] | UInt8[np.ndarray, "n h w 3"]
"""Files, folders and patterns (see `jaxft.data.unlabelled.find_images`); or an array."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities of images.

    Attributes:
      classes: class names.
      probabilities: [n k]. The softmax of the logits; if images may have several labels, the
        sigmoid of each. NaN for unreadable images.
      images: the images' files; their indices if they were given as an array.
      problems: why an image cannot be read, by index.
      multi_label: whether an image may have several labels.
    """

    classes: tuple[str, ...]
    probabilities: Float[np.ndarray, "n k"]
    images: tuple[Any, ...]
    problems: dict[int, str] = field(default_factory=dict)
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def labels(self) -> list[str | None]:
        """The most probable class of each image; None for unreadable images."""
        return [row[0][0] if row else None for row in self.top(1)]

    def assigned(self) -> list[list[tuple[str, float]]]:
        """Returns the classes that each image is assigned to, with their probabilities.

        The most probable class; with several labels, all classes with a probability above 0.5.
        """
        if not self.multi_label:
            return self.top(1)
        return [[(c, p) for c, p in row if p > 0.5] for row in self.top(len(self.classes))]

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """Returns the `count` most probable classes of each image, with their probabilities."""
        order = np.argsort(-self.probabilities, -1, kind="stable")[:, :count]
        return [
            [] if i in self.problems else [(self.classes[k], float(row[k])) for k in columns]
            for i, (row, columns) in enumerate(zip(self.probabilities, order, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network with trained weights, its class names and the preprocessing of its images.

    Attributes:
      model: the network.
      params, stats: its weights.
      classes: class names in the order of the logits.
      preprocessing: size, crop and normalisation of the images.
      pixels: dtype of the images: `uint8`, or `float32` if they are normalised already.
      multi_label: whether an image may have several labels.
      tta: `flip` averages the logits over an image and its mirror image.
      matmul_precision: see `Recipe.matmul_precision`.
      batch_size: images per batch, over all devices.
      workers: threads that read images.

    Example:
      classifier = jaxft.Classifier.load("runs/ants")
      classifier.predict("new_photos").labels
    """

    model: Model
    params: Tree
    stats: Tree
    classes: tuple[str, ...]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    pixels: str = "uint8"
    multi_label: bool = False
    tta: Tta = "none"
    matmul_precision: MatmulPrecision = "default"
    batch_size: int = 32
    workers: int = 2

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        model: Model | str | None = None,
        batch_size: int = 32,
        workers: int = 2,
    ) -> "Classifier":
        """Loads the weights of a run, ended or not, of an export, or of another source.

        From a run, these are the best weights of the stage so far or, if the stage has ended, its
        result; images are processed as in the run's validation.

        Args:
          source: as in `jaxft.weights.read`: a run's folder, a file, `hf:OWNER/REPO`, ...
          model: the network, or its name; None: as the source states.
          batch_size: images per batch, over all devices.
          workers: threads that read images.

        Raises:
          WeightsError: there are no weights, they do not fit, or their network is unknown.
        """
        description, preprocessing = weights.describe(source)
        network = _network(fspath(source), description, model)
        params, stats = weights.load(weights.read(source, own_names=not network.key_map), network)
        numbers = tuple(map(str, range(network.num_classes)))
        stated = {
            "pixels": description.pixels,
            "multi_label": description.multi_label,
            "tta": description.tta,
            "matmul_precision": description.matmul_precision,
        }
        return cls(
            network,
            params,
            stats,
            classes=description.classes or numbers,
            preprocessing=expected_preprocessing(network, preprocessing),
            batch_size=batch_size,
            workers=workers,
            **{name: value for name, value in stated.items() if value is not None},
        )

    def predict(self, images: Images, *, on_bad_image: OnBadImage = "error") -> Predictions:
        """Returns the class probabilities of images.

        Args:
          images: files, folders and patterns, or a uint8 array `[n h w 3]` of any height and width.
          on_bad_image: "error" raises an error for an unreadable image; "skip" lists it in
            `Predictions.problems`.

        Raises:
          DataError: there are no images, or one is unreadable.
        """
        source = self._source(images, on_bad_image)
        # In float64, so that the probabilities of an image sum to 1 to all digits.
        logits = self.logits(source).astype(np.float64)
        probabilities = expit(logits) if self.multi_label else softmax(logits, -1)
        problems = dict(sorted(getattr(source, "problems", {}).items()))
        probabilities[list(problems)] = np.nan
        names = getattr(source, "files", range(len(source)))
        return Predictions(self.classes, probabilities, tuple(names), problems, self.multi_label)

    def logits(self, source: Source) -> Float[np.ndarray, "n k"]:
        """Returns the logits of all images of a source, in its order."""
        return self._run(source, self._logits)

    def features(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Returns the features of images: the output of the block before the head.

        Outputs `[h w d]`, of networks whose head pools, are averaged over the positions.

        Args:
          images: as in `predict`.

        Raises:
          DataError: as in `predict`.
          WeightsError: the network is a single block.
        """
        if len(self.model.blocks) == 1:
            raise WeightsError(f"{self.model.name} is a single block: there is none before a head.")
        return self._run(self._source(images, "error"), self._features)

    def _source(self, images: Images, on_bad_image: OnBadImage) -> Source:
        if isinstance(images, np.ndarray | jax.Array):
            values: Values = "normalized" if self.pixels == "float32" else "uint8"
            targets = np.zeros(len(images), np.int32)
            return arrays(np.asarray(images), targets, self.classes, values=values)
        files = find_images([images] if isinstance(images, str | PathLike) else images)
        if not files:
            raise DataError("there are no images to classify.")
        return UnlabelledFiles(files, self.preprocessing.image_size, on_bad_image)

    def _run(self, source: Source, program: Callable[..., jax.Array]) -> np.ndarray:
        """Returns the rows of a program of `(params, stats, images, count)` for all images."""
        sizes = batch_sizes(self.model, self._devices, len(source), self.batch_size)
        batches = data.eval_batches(
            source,
            self.preprocessing,
            batch_size=self.batch_size,
            workers=self.workers,
            rows=sizes.rows,
            last_rows=sizes.last_rows,
        )
        results: list[tuple[jax.Array, int]] = []
        with closing(batches), track("Classifying images", len(source)) as work:
            for batch in batches:
                rows = len(batch.mask)
                count = sizes.examples.get(rows, rows)
                images = self._devices.batch(batch.image)
                results.append((program(*self._weights, images, count), int(batch.mask.sum())))
                jax.block_until_ready(results[-2:-1])  # limits the batches queued on the device
                work.advance(results[-1][1])
        return np.concatenate([np.asarray(rows)[:count] for rows, count in results])

    @cached_property
    def _devices(self) -> Devices:
        return Devices()

    @cached_property
    def _weights(self) -> tuple[Tree, Tree]:
        placed: tuple[Tree, Tree] = self._devices.put((self.params, self.stats))
        return placed

    @cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        def logits(params: Tree, stats: Tree, images: jax.Array, count: int) -> jax.Array:
            views = image_views(self.preprocessing.normalize(images[:count]), self.tta)
            return mean_logits(self.model, params, stats, views).astype(jnp.float32)

        return jax.jit(with_precision(logits, self.matmul_precision), static_argnums=3)

    @cached_property
    def _features(self) -> Callable[..., jax.Array]:
        apply = partial(self.model.apply, norms="running", last=self.model.blocks[-2])

        def features(params: Tree, stats: Tree, images: jax.Array, count: int) -> jax.Array:
            x = apply(params, stats, self.preprocessing.normalize(images[:count]))[0]
            return x.reshape(len(x), -1, x.shape[-1]).mean(1).astype(jnp.float32)

        return jax.jit(with_precision(features, self.matmul_precision), static_argnums=3)


def _network(source: str, description: Description, model: Model | str | None) -> Model:
    """Builds the network of weights.

    Raises:
      WeightsError: the source states no network, and `model` is None; or it does not exist.
    """
    if model is not None and not isinstance(model, str):
        return user_factory.checked(model, "model is")
    name = model or description.model
    if name is None:
        raise WeightsError(
            f"{source} does not state its network: name it with model= (--model), such as "
            "resnet50. jaxft.models.names() lists all."
        )
    count = len(description.classes or ())
    unknown = WeightsError(f"{source} states neither its classes nor their number.")
    try:
        if user_factory.names_factory(name):
            if not count:
                raise unknown
            return user_factory.build(name, count)
        like = models.create(name, num_classes=2)
        # A recipe also has options of other networks.
        options = {n: value for n, value in description.options.items() if n in like.options}
        if not count:
            count = 2 if options.get("binary") else weights.read(source).num_classes(like) or 0
        if not count:
            raise unknown
        return models.create(name, num_classes=count, **options)
    except RecipeError as error:
        raise WeightsError(
            f"{source}: {error}\nA network that a run received, finetune(model=...), is passed to "
            "Classifier.load(..., model=...) too."
        ) from error
