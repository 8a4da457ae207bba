r"""Fine-tunes a ConvNeXt-T, pretrained on ImageNet-22k, on ImageNet with layer-wise decay.

    python scripts/finetune.py configs/convnext_finetune.py --workdir runs/convnext \
        --data folder:PATH/imagenet

Source: Liu et al. 2022, arXiv:2201.03545, with the command of facebookresearch/ConvNeXt's
TRAINING.md for ConvNeXt-B at 224 pixels. 16 GPUs with 32 images each, 30 epochs; AdamW without
decay of vectors; a learning rate of 5e-5 at the head and a cosine by steps; each layer at 0.8 of
the next. A layer is the stem, the first or second stage, three blocks of the third stage, the last
stage, or the last norm with the head; the convolution before a stage belongs to its first layer.
RandAugment, random erasing and label smoothing, no mixup, no CutMix. A ConvNeXt has no running
statistics: norm mode `frozen_eval` has no effect.

Differences from the source: it has no command for ConvNeXt-T, and its layers are for networks with
27 blocks in the third stage; ConvNeXt-T has nine, so it has 8 layers instead of 14. The rate of
stochastic depth is ConvNeXt-B's. The head starts from zeros instead of a thousandth of the usual
values. Learning rates fall to 0 instead of 1e-6 times the factor of the layer. RandAugment and
random erasing differ as in vit_mae.py.

Data: ImageNet as folders, train/<class>/ and val/<class>/, or any other images.

Not measured here. Published: top-1 accuracy 82.9 % (`convnext_tiny_22k_1k_224`, whose command is
not published).
"""

from jaxft import AdamW, Recipe
from jaxft.optim.schedules import CosineAnnealingLR
from jaxft.strategies import layer_decay

THIRD = [
    ("stages.2.downsample", "stages.2.blocks[:3]"),
    "stages.2.blocks[3:6]",
    "stages.2.blocks[6:]",
]
LAYERS = ["stem", "stages.0", "stages.1", *THIRD, "stages.3", "head"]

recipe = Recipe(
    model="convnext_tiny",
    weights="hf:timm/convnext_tiny.fb_in22k",
    head="zeros",
    data="folder:data/imagenet",
    optimizer=AdamW(weight_decay=1e-8, decay_vectors=False),
    batch_size=512,
    drop_last=True,
    augment="randaugment",
    random_erasing=0.25,
    label_smoothing=0.1,
    drop_path=0.2,
    resize_size=256,
    stages=layer_decay(
        LAYERS, 5e-5, 0.8, epochs=30, schedule=CosineAnnealingLR(by="step"), restore="last"
    ),
)
