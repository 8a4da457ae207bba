"""Surgical fine-tuning: of an ImageNet ResNet-50, conv1 and layer1 alone adapt to corrupted images.

    python scripts/finetune.py configs/surgical.py --workdir runs/surgical \\
        --data folder:PATH/ImageNet-C/brightness/5

Source: Lee et al. 2022, arXiv:2210.11466, and its code: Adam with a decay of 1e-4, batches of 64,
10 epochs, the weights' own head. Norm mode E, as there; bn1 does not train. The first layers suit
inputs that have shifted, the last one (`"fc"` below) targets that have.

Each corruption is a folder of 50 images for each of 1000 classes: one of them trains, the others
validate (there ten, and ten more are for the test). They are 224 pixels wide and stay as they are.
What to expect: the paper's figures are the best of five rates, 1e-1 to 1e-5, by validation; here
`scripts/find_rate.py` may save some of them. Measured here: nothing, without ImageNet-C at hand.
"""

from jaxft import Recipe, methods

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
    stages=methods.surgical(blocks, "layer1", 1e-3, epochs=10),
)
