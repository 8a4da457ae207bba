"""Unfreezes a ResNet-18 gradually, one block more each epoch from the last, as ULMFiT does.

    python scripts/finetune.py configs/ulmfit.py --workdir runs/ulmfit

Source: Howard and Ruder 2018, arXiv:1801.06146. Discriminative learning rates (each block at the
next block's learning rate divided by 2.6), a slanted triangular schedule in every stage, Adam with
betas 0.7 and 0.99.

Difference from the source: the paper's network is a language model without norm layers. Here frozen
norm layers use running statistics, and unfrozen ones normalise with the batch (norm mode
`frozen_eval`).

Data: any folder of images, such as the ants and bees of PyTorch's tutorial. With few images, change
`epochs` of the last stage first.

Not measured here. The paper has no figures for images.
"""

from jaxft import Recipe
from jaxft.models import create
from jaxft.strategies import ulmfit

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    batch_size=32,
    stages=ulmfit(create("resnet18").block_patterns, lr=0.01, epochs=10),
)
