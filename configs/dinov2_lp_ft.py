"""Solves a linear probe on DINOv2's features, then trains the whole ViT at a low learning rate.

    python scripts/finetune.py configs/dinov2_lp_ft.py --workdir runs/dinov2 --data folder:PATH

Source: jaxft's own combination of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), which evaluates
frozen features by linear classifiers, and LP-FT (Kumar et al. 2022, arXiv:2202.10054). The probe is
a logistic regression, see `configs/lp_ft.py`. Then AdamW on a cosine, at a learning rate that moves
good features little; sweep it, for example `--stages.1.train.* 3e-6`. A ViT has no running
statistics: norm mode `eval` has no effect.

Differences from the sources: DINOv2's linear classifiers are trained by SGD with augmentation and
may read the mean of the patches too; LP-FT trains by SGD without weight decay. The network was
pretrained at 518 pixels; this recipe has 224, a fifth of the cost, and interpolates the position
embeddings.

Data: any folder of images, such as the ants and bees of PyTorch's tutorial.

Not measured here.
"""

from jaxft import AdamW, Recipe
from jaxft.strategies import linear_probe_then_finetune

recipe = Recipe(
    model="vit_small_patch14_dinov2",
    weights="hf:timm/vit_small_patch14_dinov2.lvd142m",
    data="folder:data/hymenoptera",
    image_size=224,
    resize_size=256,
    stages=linear_probe_then_finetune(
        ["*", "head"],
        lr=1e-5,
        epochs=20,
        optimizer=AdamW(weight_decay=0.05, decay_vectors=False),
    ),
)
