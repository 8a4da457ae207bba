"""Trains a ResNet-50 on ImageNet from scratch: torchvision's reference recipe for its V1 weights.

    python scripts/finetune.py configs/torchvision_reference.py --workdir runs/imagenet

Source: pytorch/vision, `references/classification/train.py` with its defaults. Eight GPUs with 32
images each, SGD at 0.1 with momentum, weight decay 1e-4 on all parameters, a tenth of the learning
rate every 30 of 90 epochs. Every layer trains, so all norm layers are in mode `train_all`. With
eight devices each one normalises its own 32 images, as DistributedDataParallel does; one device
normalises all 256.

Data: ImageNet as folders, train/<class>/ and val/<class>/, 1000 classes each.

Not measured here. Published: top-1 accuracy 76.130 % (`ResNet50_Weights.IMAGENET1K_V1`).
"""

from jaxft import SGD, Recipe
from jaxft.optim.schedules import StepLR
from jaxft.strategies import full

recipe = Recipe(
    model="resnet50",
    data="folder:data/imagenet",
    optimizer=SGD(momentum=0.9, weight_decay=1e-4),
    batch_size=256,
    statistics="replica",
    image_size=224,
    resize_size=256,
    stages=full(0.1, epochs=90, schedule=StepLR(30), restore="last"),
)
