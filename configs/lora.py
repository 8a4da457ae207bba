"""LoRA: adapters of a pretrained ResNet and a new head, then the merged network as a whole.

    python scripts/finetune.py configs/lora.py --workdir runs/lora

Source: jaxft's own example of Hu et al. 2021 (arXiv:2106.09685). Differences: the adapters belong
to convolutions, as in PEFT; a last stage merges them and trains the whole network. Weights and
images as in `configs/quickstart.py`. Frozen norm layers use running statistics (norm mode
`frozen_eval`).

Measured over seeds 0 to 4 (`--seed`), 74 to 101 s each on 2 shared CPU cores: accuracy 0.762
(0.639-0.873) with the adapters, 0.870 (0.795-0.912) after the last stage. The adapters are 9 % of
the parameters. Without the last stage, `runs/lora/adapter` holds them in PEFT's files.
"""

from jaxft import Adam, Recipe, Stage

recipe = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=2,
    lora={"layer*": 4},
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
        Stage("adapters", train={"fc": 1e-3, "**.lora_*": 1e-2}, epochs=20, restore="last"),
        Stage("merged", train={"*": 1e-3}, epochs=30, restore="last", merge_lora=True),
    ),
)
