"""torchvision's reference training: a ResNet-50 on ImageNet from scratch, its V1 weights.

    python scripts/finetune.py configs/torchvision_reference.py --workdir runs/imagenet

Source: pytorch/vision, `references/classification/train.py` with its defaults: eight GPUs with 32
images each, SGD at 0.1 with momentum and decay 1e-4 of everything, a tenth of the rate every 30 of
90 epochs. Everything trains, so all norm layers are in mode C; with eight devices each normalises
its 32 images by themselves, as DistributedDataParallel does, with one all 256 together.

Published: top-1 accuracy 76.130 % (`ResNet50_Weights.IMAGENET1K_V1`). Measured here: nothing. The
data are ImageNet as folders: train/<class>/ and val/<class>/, a thousand each.
"""

from jaxft import SGD, Recipe
from jaxft.methods import full
from jaxft.optim.schedules import StepLR

recipe = Recipe(
    model="resnet50",
    data="folder:data/imagenet",
    optimizer=SGD(momentum=0.9, weight_decay=1e-4),
    batch_size=256,
    statistics="replica",
    image_size=224,
    resize_size=256,
    stages=full(0.1, epochs=90, schedule=StepLR(30), hand_on="last"),
)
