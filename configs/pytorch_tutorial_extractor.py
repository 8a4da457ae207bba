"""PyTorch's transfer-learning tutorial: ants and bees with a frozen ResNet-18 and a new head.

    python scripts/finetune.py configs/pytorch_tutorial_extractor.py --workdir runs/ants

Source: "Transfer Learning for Computer Vision Tutorial", pytorch.org, `ConvNet as fixed feature
extractor`. SGD with momentum at 1e-3, a tenth of it after every 7 epochs. Norm mode A, as there:
the tutorial calls `model.train()`, so its frozen layers normalise with the batch of 4 images.

Measured with an ImageNet ResNet-50 at 160 pixels and two epochs: accuracy 0.874 (0.863-0.882 over 3
seeds); see the README for PyTorch's.
"""

from jaxft import SGD, Recipe, Stage
from jaxft.optim.schedules import StepLR

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=4,
    stages=(Stage("head", train={"fc": 1e-3}, epochs=25, schedule=StepLR(7), norms="A"),),
)
