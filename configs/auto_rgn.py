r"""Trains an ImageNet ResNet-50 with Auto-RGN, learning rates by relative gradient norm.

    python scripts/finetune.py configs/auto_rgn.py --workdir runs/auto_rgn \
        --data folder:PATH/ImageNet-C/brightness/5

Source: Lee et al. 2022, arXiv:2210.11466, and the authors' code. Before each epoch the relative
gradient norm of each tensor is computed: the norm of its gradient divided by its own norm. The
tensor's learning rate is then 1e-3 times this ratio, divided by the largest ratio, and Adam (weight
decay 1e-4) starts with empty moments. Batches of 64 images, 10 epochs, the head of the weights. All
norm layers use running statistics (norm mode `eval`). As in the authors' code, every tensor trains
whose torch name does not contain "bn"; so the only norm layers that train are in the shortcuts.

Difference from the source: the ratios are computed over the first five batches of the epoch; the
authors draw five batches in another order.

Data: one corruption of ImageNet-C, a folder with 50 images for each of 1000 classes. One image of
each class trains, the others validate (the authors validate on ten and test on ten more). The
images are 224 pixels wide and are not resized. The paper's figures are the best of five learning
rates, 1e-1 to 1e-5, by validation; `scripts/find_lr.py` can replace some of these runs.

Not measured here, as ImageNet-C was not available.
"""

from jaxft import Recipe, strategies

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv_in1k",
    head="keep",
    data="folder:data/ImageNet-C/brightness/5",
    shots=1,
    batch_size=64,
    augment="none",
    resize_size=224,
    stages=strategies.auto_rgn(["**.kernel", "**.downsample", "fc"], 1e-3, epochs=10),
)
