"""Auto-RGN: every tensor of an ImageNet ResNet-50 at a rate by its relative gradient norm.

    python scripts/finetune.py configs/auto_rgn.py --workdir runs/auto_rgn \\
        --data folder:PATH/ImageNet-C/brightness/5

Source: Lee et al. 2022, arXiv:2210.11466, and its code. Before each epoch the rate of each tensor
becomes 1e-3 times the ratio of its gradient's norm to its own, by the largest such ratio, and Adam
(decay 1e-4) begins anew; batches of 64, 10 epochs, the weights' own head. Norm mode E, as there.
As there, all trains but what has "bn" in its torch name: of the norms only those of the shortcuts.
The ratios are of the epoch's first five batches, where the authors draw five of another order.

Each corruption is a folder of 50 images for each of 1000 classes: one of them trains, the others
validate (there ten, and ten more are for the test). They are 224 pixels wide and stay as they are.
What to expect: the paper's figures are the best of five rates, 1e-1 to 1e-5, by validation; here
`scripts/find_rate.py` may save some of them. Measured here: nothing, without ImageNet-C at hand.
"""

from jaxft import Recipe, methods

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv_in1k",
    head="keep",
    data="folder:data/ImageNet-C/brightness/5",
    shots=1,
    batch_size=64,
    augment="none",
    resize_size=224,
    stages=methods.auto_rgn(["**.kernel", "**.downsample", "fc"], 1e-3, epochs=10),
)
