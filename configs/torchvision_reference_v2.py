"""Trains a ResNet-50 on ImageNet from scratch: torchvision's newer recipe for its V2 weights.

    python scripts/finetune.py configs/torchvision_reference_v2.py --workdir runs/imagenet_v2

Source: pytorch/vision, `references/classification`, and "How to Train State-Of-The-Art Models Using
TorchVision's Latest Primitives", pytorch.org. Eight GPUs with 128 images each, 600 epochs, warm-up
and cosine, TrivialAugment, random erasing, mixup or cutmix, label smoothing, no decay of norm
layers, an average of the weights. Every layer trains, so all norm layers are in mode `train_all`;
see torchvision_reference.py for their statistics on several devices.

Differences from the source: torchvision trains on crops of 176 pixels; this recipe trains on the
224 pixels of evaluation, at about 1.6 times the cost. torchvision shows a quarter of the images in
an epoch, each in four views (`--ra-sampler`); this recipe shows all images in one view.
torchvision's average starts after the warm-up of the learning rate and counts its 32 steps again in
each epoch; this one starts with the stage.

Data: ImageNet as folders, train/<class>/ and val/<class>/, 1000 classes each.

Not measured here. Published: top-1 accuracy 80.858 % (`ResNet50_Weights.IMAGENET1K_V2`).
"""

from jaxft import EMA, SGD, Recipe, Stage, Update
from jaxft.optim.schedules import CosineAnnealingLR, Warmup

NORMS = ("**.bn*", "**.downsample.1")

recipe = Recipe(
    model="resnet50",
    data="folder:data/imagenet",
    optimizer=SGD(momentum=0.9, weight_decay=2e-5),
    batch_size=1024,
    statistics="replica",
    augment="trivialaugment",
    random_erasing=0.1,
    mixup=0.2,
    cutmix=1.0,
    label_smoothing=0.1,
    image_size=224,
    resize_size=232,
    stages=(
        Stage(
            "all",
            train={**dict.fromkeys(NORMS, Update(0.5, weight_decay=0.0)), "*": 0.5},
            epochs=600,
            schedule=Warmup(5, then=CosineAnnealingLR(), start_factor=0.01),
            # --model-ema-decay 0.99998, which torchvision scales: 1 - 2e-5 * 8 * 128 * 32 / 600.
            ema=EMA(0.9989077, every=32),
            restore="last",
        ),
    ),
)
