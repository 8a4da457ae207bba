"""BiT's hyper-rule: everything from a zero head, for as long as the number of images says.

    python scripts/finetune.py configs/bit.py --workdir runs/bit --data folder:PATH

Source: Kolesnikov et al. 2019, arXiv:1912.11370; see `jaxft.methods.bit` for what is the paper's
and what its code's. Set `images` to the size of your training set: it decides steps and mixup.
Everything trains, so all norm layers are in mode C.

Not as there: the weights are a ResNet-50 of ImageNet-1k with BatchNorm, not BiT's with GroupNorm
and standardised weights; images are squashed to 480x480 as in its evaluation, and to train on only
mirrored, where BiT takes a random 480x480 of 512x512. Images below 96x96 are for BiT 128x128:
`--image-size 128 --resize-size 128`. Validation follows each pass over the images; with fewer than
512 of them, that is each step. Published figures are of BiT's weights. Measured here: nothing.
"""

from jaxft import Recipe
from jaxft.methods import bit

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
