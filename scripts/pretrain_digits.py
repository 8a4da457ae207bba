"""Pretrains the quick start's weights: a CIFAR-layout ResNet-8 on the digits 0 to 4.

    python scripts/pretrain_digits.py

Writes jaxft/assets/digits_0to4.safetensors (torch's names, float32).
"""

import shutil
from pathlib import Path

import jaxft
from jaxft import Adam, Recipe, Stage, finetune

recipe = Recipe(
    model="cifar_resnet8",
    data="digits:0-4",
    optimizer=Adam(weight_decay=1e-4),
    batch_size=32,
    augment="shift",
    image_size=8,
    resize_size=None,
    mean=(0.3, 0.3, 0.3),
    std=(0.38, 0.38, 0.38),
    stages=(Stage("pretrain", train={"*": 3e-3}, epochs=25, hand_on="last"),),
)

if __name__ == "__main__":
    result = finetune(recipe, workdir="runs/pretrain_digits")
    asset = Path(jaxft.__file__).parent / "assets" / "digits_0to4.safetensors"
    asset.parent.mkdir(exist_ok=True)
    shutil.copy(result.weights, asset)
    print(f"Validation accuracy {result.score.accuracy:.4f}; written to {asset}")
