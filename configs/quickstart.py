"""Trains a small ResNet, pretrained on the digits 0-4, on two images each of the digits 5-9.

    python scripts/finetune.py configs/quickstart.py --workdir runs/quickstart

Source: jaxft's own example. The package includes the weights (`scripts/pretrain_digits.py` makes
them) and scikit-learn includes the digits, so nothing is downloaded. 10 images train, the other 886
validate. Each stage returns its last epoch, so that the validation images select nothing. Frozen
norm layers use running statistics (norm mode `frozen_eval`).

Measured over seeds 0 to 4 (`--seed`), about a minute each on 2 CPU cores: accuracy 0.874
(0.787-0.926). The same network trained from random weights is worse for every seed; see
`configs/quickstart_from_scratch.py`.
"""

from jaxft import Adam, Recipe, Stage

recipe = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=2,
    optimizer=Adam(),
    batch_size=10,
    steps_per_execution=10,  # otherwise validation waits for Python
    augment="shift",
    image_size=8,
    resize_size=8,
    mean=(0.3, 0.3, 0.3),
    std=(0.38, 0.38, 0.38),
    stages=(
        Stage("head", train={"fc": 1e-2}, epochs=10, restore="last"),
        Stage("late", train={"fc": 1e-3, "layer3": 1e-3}, epochs=20, restore="last"),
        Stage("all", train={"*": 1e-3}, epochs=30, restore="last"),
    ),
)
