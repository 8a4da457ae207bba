"""PyTorch's transfer-learning tutorial: ants and bees, all of a ResNet-18 fine-tuned.

    python scripts/finetune.py configs/pytorch_tutorial_finetune.py --workdir runs/ants

Source: "Transfer Learning for Computer Vision Tutorial", pytorch.org, `finetuning the ConvNet`.
SGD with momentum at 1e-3, a tenth of it after every 7 epochs; the best epoch by validation is
kept, if strictly better. Everything trains, so all norm layers are in mode C.

Measured with an ImageNet ResNet-50 at 160 pixels and two epochs: accuracy 0.669 (0.595-0.725 over 3
seeds); see the README for PyTorch's. The batches are few for a ResNet-50's norm layers.
"""

from jaxft import SGD, Recipe
from jaxft.methods import full
from jaxft.optim.schedules import StepLR

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=4,
    stages=full(1e-3, epochs=25, schedule=StepLR(7)),
)
