r"""Unfreezes a ViT-Ti/16 gradually, four blocks more a stage, with cached features below them.

    python scripts/finetune.py configs/vit_gradual_unfreezing.py --workdir runs/vit_gradual \
        --data folder:PATH

Source: Howard and Ruder 2018, arXiv:1801.06146. Discriminative learning rates (each group at the
next group's learning rate divided by 2.6), a slanted triangular schedule in every stage, Adam with
betas 0.7 and 0.99, as in `configs/ulmfit.py`. Each image has two augmented views, so that the
output of the frozen blocks is computed once for each and then cached.

Differences from the source: the paper unfreezes a layer of a language model per epoch and then
trains all of them; here four of the twelve blocks join in each stage, and all stages have the same
length. A ViT has no running statistics: norm mode `frozen_eval` has no effect.

Data: any folder of images, such as the ants and bees of PyTorch's tutorial.

Measured from random weights, to test the stages and not the method: `--weights None --image-size 64
--steps-per-execution 4`, ants and bees, seeds 0 to 2, 139 to 186 s each on 2 shared CPU cores:
accuracy 0.708 (0.680-0.725) in the best epoch; the larger class has 0.542. A run that was killed in
the second stage (`kill -9`) and resumed ended with the same weights, bit for bit.
"""

from jaxft import Adam, Recipe
from jaxft.optim.schedules import SlantedTriangular
from jaxft.strategies import gradual_unfreeze

BLOCKS = ["*", "blocks[4:8]", "blocks[8:]", ("norm", "head")]

recipe = Recipe(
    model="vit_tiny_patch16_224",
    weights="hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    data="folder:data/hymenoptera",
    optimizer=Adam(b1=0.7, b2=0.99),
    num_views=2,
    stages=gradual_unfreeze(BLOCKS, 1e-3, epochs=6, schedule=SlantedTriangular()),
)
