"""Trains all layers from a zero head by BiT's hyper-rule: the number of images sets the length.

    python scripts/finetune.py configs/bit.py --workdir runs/bit --data folder:PATH

Source: Kolesnikov et al. 2019, arXiv:1912.11370; `jaxft.strategies.bit` lists which rules come from
the paper and which from its code. Set `images` to the size of your training set: it determines the
number of steps and mixup. Every layer trains, so all norm layers are in mode `train_all`.

Differences from the source: the weights are a ResNet-50 with BatchNorm, trained on ImageNet-1k, not
BiT's network with GroupNorm and standardised weights. Images are squashed to 480x480, as in BiT's
evaluation. Training images are only mirrored, where BiT takes a random crop of 480x480 from
512x512. For images smaller than 96x96 BiT uses 128x128: `--image-size 128 --resize-size 128`.
Validation follows each pass over the images; with fewer than 512 images this is each step.

Not measured here. The published figures are for BiT's weights.
"""

from jaxft import Recipe
from jaxft.strategies import bit

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv_in1k",
    head="zeros",
    data="folder:data/pets",
    augment="flip",
    image_size=480,
    resize_size=480,
    resize_mode="squash",
    interpolation="bilinear",
    stages=bit(images=3680),
)
