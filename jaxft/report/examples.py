"""Images of a report: the worst mistakes, the least certain images, augmented training images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.special import expit, log_expit, log_softmax

from jaxft.data.batches import train_view_loader
from jaxft.data.fingerprint import identity
from jaxft.data.image_files import printable
from jaxft.data.preprocessing import Preprocessing, eval_view
from jaxft.data.source import Source
from jaxft.recipe import Recipe
from jaxft.report.figure import shorten

SHOWN = 24  # images in a gallery
VIEWS = 5  # augmented views of an image
_SIDE = 144  # pixels
_CAPTION = 26  # pixels, below an image of a contact sheet


@dataclass(frozen=True)
class Example:
    """A picture with its caption.

    Attributes:
      picture: RGB image of `_SIDE` pixels.
      caption: lines below it.
    """

    picture: Image.Image
    caption: tuple[str, ...]

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        data = io.BytesIO()
        self.picture.save(data, format="JPEG", quality=82)
        return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


@dataclass(frozen=True)
class Judgements:
    """Predictions for the validation images.

    Attributes:
      losses: cross entropy of each image [n]; infinite where it is NaN.
      confidence: probability of the predicted class; with several labels, the mean probability of
        the predicted answers [n]. NaN counts as 0.
      hits: whether the image is classified correctly, in all of its labels [n].
      captions: class and prediction of each image.
    """

    losses: np.ndarray
    confidence: np.ndarray
    hits: np.ndarray
    captions: Sequence[tuple[str, ...]]

    @property
    def worst(self) -> list[int]:
        """The mistakes with the highest losses."""
        order = np.argsort(-self.losses, kind="stable")
        return [int(i) for i in order if not self.hits[i]][:SHOWN]

    @property
    def least_certain(self) -> list[int]:
        """The images with the lowest confidence."""
        return [int(i) for i in np.argsort(self.confidence, kind="stable")[:SHOWN]]


def judge(logits: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> Judgements:
    """Returns the predictions of logits `[n k]` for targets `[n]`, or `[n k]` of several labels."""
    logits = np.asarray(logits, np.float64)
    if targets.ndim == 2:
        losses = -np.where(targets == 1, log_expit(logits), log_expit(-logits)).mean(-1)
        predicted = logits > 0
        confidence = expit(np.abs(logits)).mean(-1)
        hits = (predicted == targets).all(-1) & np.isfinite(losses)
        captions = [
            _label_caption(row, truth, classes)
            for row, truth in zip(predicted, targets == 1, strict=True)
        ]
    else:
        scores, rows = log_softmax(logits, -1), np.arange(len(targets))
        losses, best = -scores[rows, targets], scores.argmax(-1)
        confidence = np.exp(scores[rows, best])
        hits = (best == targets) & np.isfinite(losses)
        captions = [
            (classes[target], f"{'correct' if k == target else classes[k]}, {p:.0%}")
            for target, k, p in zip(targets, best, confidence, strict=True)
        ]
    losses = np.nan_to_num(losses, nan=np.inf)
    return Judgements(losses, np.nan_to_num(confidence), hits, captions)


def gallery(
    source: Source, indices: Sequence[int], judged: Judgements, preprocessing: Preprocessing
) -> list[Example]:
    """Returns the images with these indices as the network sees them, if readable."""
    examples = []
    for index in indices:
        try:
            picture = _picture(eval_view(source[index][0], preprocessing))
        except Exception:  # a source of the user may raise anything
            continue
        examples.append(Example(picture, (*judged.captions[index], _file_name(source, index))))
    return examples


def augmented(source: Source, recipe: Recipe, stage: int, count: int) -> list[Example]:
    """Returns training images, each followed by its views in the first epochs of a stage.

    Leaves out unreadable images.

    Args:
      source: training images.
      recipe: the run's recipe.
      stage: index of the stage.
      count: number of training images.
    """
    settings, preprocessing = recipe.settings(recipe.stages[stage]), recipe.preprocessing
    load = train_view_loader(source, preprocessing, settings.augment, seed=recipe.seed, stage=stage)
    examples: list[Example] = []
    for index in np.random.default_rng(recipe.seed).permutation(len(source))[: 3 * count].tolist():
        if len(examples) == count * (VIEWS + 1):
            break
        try:
            views = [eval_view(source[index][0], preprocessing)]
            views += [load(index, view)[0] for view in range(VIEWS)]
        except Exception:
            continue
        names = ["original", *(f"epoch {view + 1}" for view in range(VIEWS))]
        examples += [
            Example(_picture(view), (name,)) for view, name in zip(views, names, strict=True)
        ]
    return examples


def contact_sheet(examples: Sequence[Example], columns: int = 6) -> bytes:
    """Returns a PNG of the pictures with their captions, in rows."""
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * (_SIDE + 6), rows * (_SIDE + _CAPTION + 6)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, example in enumerate(examples):
        x, y = i % columns * (_SIDE + 6) + 3, i // columns * (_SIDE + _CAPTION + 6) + 3
        sheet.paste(example.picture, (x, y))
        for line, text in enumerate(example.caption[:2]):
            draw.text((x, y + _SIDE + 1 + 12 * line), shorten(text, 26), "black", font)
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    return data.getvalue()


def _picture(pixels: np.ndarray) -> Image.Image:
    """Returns pixels [h w 3] as a picture; float ones are scaled from their range."""
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(np.asarray(pixels, np.float32))
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (255 * (pixels - low) / max(high - low, 1e-6)).astype(np.uint8)
    image = Image.fromarray(pixels)
    small = max(image.size) < _SIDE // 2
    return image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST if small else None)


def _label_caption(
    predicted: np.ndarray, truth: np.ndarray, classes: Sequence[str]
) -> tuple[str, ...]:
    masks = {
        "": predicted & truth,
        "missed: ": truth & ~predicted,
        "wrong: ": predicted & ~truth,
    }
    lines = [
        text + ", ".join(classes[k] for k in np.flatnonzero(mask).tolist())
        for text, mask in masks.items()
        if mask.any()
    ]
    return tuple(lines) or ("no label",)


def _file_name(source: Source, index: int) -> str:
    name, zero, _ = str(identity(source, index)).partition("\0")
    return printable(name) if zero else f"image {index}"  # a file has a name and a size
