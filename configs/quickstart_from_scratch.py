"""Trains the small ResNet of `configs/quickstart.py` from random weights, for comparison.

    python scripts/finetune.py configs/quickstart_from_scratch.py --workdir runs/from_scratch

Source: jaxft's own example. Data, network and settings are the same as in `configs/quickstart.py`.
A single stage trains all parameters for 60 epochs, as long as the three stages there together. It
returns its last epoch, so that the validation images select nothing. All norm layers train and use
batch statistics (norm mode `frozen_eval`).

Measured over seeds 0 to 4 (`--seed`), about a minute each on 2 CPU cores: accuracy 0.802
(0.726-0.866). Fine-tuning reaches 0.874 and is better for every seed. The learning rate is no worse
than its neighbours: 1e-3 gives 0.769, 4e-3 gives 0.800.
"""

from jaxft import Adam, Recipe, Stage

recipe = Recipe(
    model="cifar_resnet8",
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
    stages=(Stage("scratch", train={"*": 2e-3}, epochs=60, restore="last"),),
)
