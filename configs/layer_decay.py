"""Trains a ResNet-18 with layer-wise learning rate decay: each block at 0.75 of the next one.

    python scripts/finetune.py configs/layer_decay.py --workdir runs/layer_decay --data folder:PATH

Source: Bao et al. 2021, arXiv:2106.08254 (BEiT), and timm's `--layer-decay`. timm's layers of a
ResNet are the stem, each residual block, and the head; the learning rates fall from 1e-3 at the
head to 7.5e-5 at the stem. AdamW without decay of norms and biases; a linear warm-up, then a
cosine. Every layer trains, so all norm layers are in mode `train_all`.

Difference from the source: published values are for transformers. The learning rate and length here
are a starting point for a ResNet-18 and a small data set; they are not tuned.

Not measured here.
"""

from jaxft import AdamW, Recipe
from jaxft.optim.schedules import CosineAnnealingLR, Warmup
from jaxft.strategies import layer_decay

BLOCKS = [("conv1", "bn1"), *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"]

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=AdamW(weight_decay=0.05, decay_vectors=False),
    batch_size=32,
    label_smoothing=0.1,
    stages=layer_decay(
        BLOCKS,
        1e-3,
        0.75,
        epochs=30,
        schedule=Warmup(3, then=CosineAnnealingLR(), start_factor=0.01),
        restore="last",
    ),
)
