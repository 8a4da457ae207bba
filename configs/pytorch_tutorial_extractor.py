"""Trains a new head on a frozen ResNet-18, ants and bees: PyTorch's transfer-learning tutorial.

    python scripts/finetune.py configs/pytorch_tutorial_extractor.py --workdir runs/ants

Source: "Transfer Learning for Computer Vision Tutorial", pytorch.org, `ConvNet as fixed feature
extractor`. SGD with momentum at 1e-3, a tenth of it after every 7 epochs. Norm mode `batch`: the
tutorial calls `model.train()`, so its frozen norm layers normalise with the batch of 4 images.

Measured with an ImageNet ResNet-50 at 160 pixels for two epochs: accuracy 0.874 (0.863-0.882 over 3
seeds). PyTorch reaches 0.843 (0.810-0.863), see jaxft/parity/README.md.
"""

from jaxft import SGD, Recipe, Stage
from jaxft.optim.schedules import StepLR

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=4,
    stages=(Stage("head", train={"fc": 1e-3}, epochs=25, schedule=StepLR(7), norms="batch"),),
)
