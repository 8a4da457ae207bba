r"""Trains only conv1 and layer1 of an ImageNet ResNet-50 on corrupted images.

    python scripts/finetune.py configs/surgical.py --workdir runs/surgical \
        --data folder:PATH/ImageNet-C/brightness/5

Source: Lee et al. 2022, arXiv:2210.11466, and the authors' code. Adam with a weight decay of 1e-4,
batches of 64, 10 epochs, the head of the weights. Norm mode `eval`: all norm layers use running
statistics; bn1 does not train. The first layers suit a shift of the inputs, the last layer (`"fc"`
below) a shift of the targets.

Data: one corruption of ImageNet-C, a folder with 50 images for each of 1000 classes. One image of
each class trains, the others validate (the authors validate on ten and test on ten more). The
images are 224 pixels wide and are not resized. The paper's figures are the best of five learning
rates, 1e-1 to 1e-5, by validation; `scripts/find_lr.py` can replace some of these runs.

Not measured here, as ImageNet-C was not available.
"""

from jaxft import Recipe, strategies

blocks = [("conv1", "layer1"), "layer2", "layer3", "layer4", "fc"]

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv_in1k",
    head="keep",
    data="folder:data/ImageNet-C/brightness/5",
    shots=1,
    batch_size=64,
    augment="none",
    resize_size=224,
    stages=strategies.surgical(blocks, "layer1", 1e-3, epochs=10),
)
