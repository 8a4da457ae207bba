"""Pretrains the quick start's weights: a CIFAR-layout ResNet-8 on the digits 0 to 4.

    python scripts/pretrain_digits.py

The network learns 40 classes, each digit in its eight orientations (quarter turns and mirror
images): features of five classes alone would transfer worse. Writes
jaxft/assets/digits_0to4.safetensors (torch's names, float32). Seeded; deterministic on one machine.
"""

import shutil
import tempfile
from pathlib import Path

from PIL import Image

import jaxft
from jaxft import SGD, Recipe, Stage, data, finetune

ORIENTATIONS = [None, *Image.Transpose]  # unchanged, and Pillow's seven others


def write_orientations(folder: Path) -> None:
    """Writes the digits 0 to 4 as FOLDER/{train,val}/<digit>_<orientation>/<index>.png."""
    for split, source in zip(("train", "val"), data.open_source("digits:0-4"), strict=True):
        for index in range(len(source)):
            image, target = source[index]
            for number, orientation in enumerate(ORIENTATIONS):
                class_folder = folder / split / f"{source.classes[target]}_{number}"
                class_folder.mkdir(parents=True, exist_ok=True)
                view = image if orientation is None else image.transpose(orientation)
                view.save(class_folder / f"{index}.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_orientations(Path(scratch, "images"))
        recipe = Recipe(
            model="cifar_resnet8",
            data=f"folder:{scratch}/images",
            optimizer=SGD(momentum=0.9, weight_decay=5e-3),
            batch_size=64,
            augment="shift",
            image_size=8,
            resize_size=8,
            mean=(0.3, 0.3, 0.3),
            std=(0.38, 0.38, 0.38),
            stages=(Stage("pretrain", train={"*": 0.05}, epochs=25),),
        )
        result = finetune(recipe, Path(scratch, "run"))
        asset = Path(jaxft.__file__).parent / "assets" / "digits_0to4.safetensors"
        shutil.copy(result.weights, asset)
    print(f"Validation accuracy {result.score.accuracy:.4f} on 40 classes; wrote {asset.name}")


if __name__ == "__main__":
    main()
