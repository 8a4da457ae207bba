"""Trains all of a ResNet-18 on ants and bees: PyTorch's transfer-learning tutorial.

    python scripts/finetune.py configs/pytorch_tutorial_finetune.py --workdir runs/ants

Source: "Transfer Learning for Computer Vision Tutorial", pytorch.org, `finetuning the ConvNet`. SGD
with momentum at 1e-3, a tenth of it after every 7 epochs. The run returns the best epoch by
validation; a later epoch must be strictly better. Every layer trains, so all norm layers are in
mode `train_all`.

Measured with an ImageNet ResNet-50 at 160 pixels for two epochs: accuracy 0.669 (0.595-0.725 over 3
seeds). PyTorch reaches 0.688 (0.601-0.778), see jaxft/parity/README.md. Batches of 4 images are
small for the norm layers of a ResNet-50.
"""

from jaxft import SGD, Recipe
from jaxft.optim.schedules import StepLR
from jaxft.strategies import full

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=4,
    stages=full(1e-3, epochs=25, schedule=StepLR(7)),
)
