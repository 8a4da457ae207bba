"""Trains a ResNet-50 on cats and dogs, unfreezing layers at two epochs: Lightning's example.

    python scripts/finetune.py configs/lightning_milestones.py --workdir runs/cats_dogs

Source: PyTorch Lightning, `examples/pytorch/domain_templates/computer_vision_fine_tuning.py`, with
milestones at epochs 5 and 10 of 15. One Adam for the whole run. Its MultiStepLR divides all
learning rates by ten at each milestone, and newly unfrozen layers start at a tenth of the head's
learning rate. The head is 2048-256-ReLU-32-1 under BCEWithLogitsLoss. Norm layers never train
(`train_bn=False`): norm mode `frozen_batch` until their blocks are unfrozen, then `batch`.

Data: cats_and_dogs_filtered.zip, train/ with 2,000 images and validation/ with 1,000.

Not measured here. Expect the head stage to reach nearly the final accuracy, as ImageNet has classes
of both animals.
"""

from jaxft import Adam, Recipe, Stage

CONVS = ("layer*.*.conv*", "layer*.0.downsample.0")

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv2_in1k",
    head_layers=(256, "relu", 32),
    binary=True,
    data="folder:data/cats_and_dogs_filtered",
    optimizer=Adam(),
    batch_size=8,
    augment="flip",
    image_size=224,
    resize_size=224,
    resize_mode="squash",
    stages=(
        Stage("head", train={"fc": 1e-3}, epochs=5, restore="last", norms="frozen_batch"),
        Stage(
            "layers",
            train={"fc": 1e-4, **dict.fromkeys(CONVS, 1e-5)},
            epochs=5,
            restore="last",
            carry="keep",
            norms={"layer*": "batch", "*": "frozen_batch"},
        ),
        Stage(
            "all",
            train={"fc": 1e-5, **dict.fromkeys(CONVS, 1e-6), "conv1": 1e-6},
            epochs=5,
            restore="last",
            carry="keep",
            norms="batch",
        ),
    ),
)
