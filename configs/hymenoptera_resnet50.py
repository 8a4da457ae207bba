"""Ants and bees: an ImageNet ResNet-50, head first, then layer4.

    python scripts/finetune.py configs/hymenoptera_resnet50.py --workdir runs/hymenoptera \
        --data folder:PATH/TO/hymenoptera --weights resnet50_imagenet.safetensors
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
