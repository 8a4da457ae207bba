"""ULMFiT's gradual unfreezing on a ResNet-18: a block more each epoch, from the last.

    python scripts/finetune.py configs/ulmfit.py --workdir runs/ulmfit

Source: Howard and Ruder 2018, arXiv:1801.06146: discriminative rates (each block at that of the
next divided by 2.6), a slanted triangle in every stage, Adam with betas 0.7 and 0.99. The paper's
network is a language model and has no norm layers; here frozen ones are in mode B, thawed ones
train on batch statistics.

For any folder of images, such as those of PyTorch's tutorial. The paper has no figures for images
to expect; with few of them, the last stage's `epochs` is what to change first. Measured here:
nothing.
"""

from jaxft import Recipe
from jaxft.methods import ulmfit
from jaxft.models import create

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    batch_size=32,
    stages=ulmfit(create("resnet18").block_patterns, lr=0.01, epochs=10),
)
