r"""Trains the head of an ImageNet ResNet-50 on ants and bees, then layer4 with it.

    python scripts/finetune.py configs/hymenoptera_resnet50.py --workdir runs/hymenoptera \
        --data folder:PATH/hymenoptera --weights PATH/resnet50_imagenet.safetensors

Source: the usual two stages of a fine-tuning script, on the data of PyTorch's transfer-learning
tutorial (244 images to train on, 153 to validate). Any folder with train/<class>/ and val/<class>/
serves. The weights are a ResNet-50 with its strides in the 1x1 convolutions; for torchvision's
weights add `--stride-in-1x1 False`. Frozen norm layers use running statistics (norm mode
`frozen_eval`).

Measured with seed 0 on 2 CPU cores: accuracy 0.980 after 2 min 56 s. The head alone reaches it.
layer4 does not improve on it (0.967), so the second stage returns the weights it started from.
"""

from jaxft import SGD, Recipe, Stage

recipe = Recipe(
    model="resnet50",
    stride_in_1x1=True,
    weights="resnet50_imagenet.safetensors",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=16,
    stages=(
        Stage("head", train={"fc": 1e-3}, epochs=3),
        Stage("late", train={"fc": 1e-3, "layer4": 1e-4}, epochs=3),
    ),
)
