"""Trains the head and all biases of a ViT-B/16, 0.1 % of its parameters (BitFit).

    python scripts/finetune.py configs/bitfit.py --workdir runs/bitfit --data folder:PATH

Source: Ben Zaken et al. 2022, arXiv:2106.10199: the biases of linear layers and of layer norms
train, with AdamW without weight decay, at learning rates from 1e-4 to 1e-3. To train the layer
norms instead, replace the pattern `**.bias` by `**.norm*`, which selects their scales too. A ViT
has no running statistics: norm mode `frozen_eval` has no effect.

Differences from the source: the paper's network is a language model (BERT). The cosine, the length
and the higher learning rate of the new head are a starting point and not tuned.

Data: any folder of images, such as the ants and bees of PyTorch's tutorial.

Not measured here. The paper has no figures for images.
"""

from jaxft import AdamW, Recipe, Stage
from jaxft.optim.schedules import CosineAnnealingLR

recipe = Recipe(
    model="vit_base_patch16_224",
    weights="hf:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    data="folder:data/hymenoptera",
    optimizer=AdamW(weight_decay=0.0),
    stages=(
        Stage(
            "biases",
            train={"head": 1e-3, "**.bias": 4e-4},
            epochs=20,
            schedule=CosineAnnealingLR(),
        ),
    ),
)
