"""Trains a ResNet-101 with L2-SP: a penalty on the distance from the pretrained weights.

    python scripts/finetune.py configs/l2_sp.py --workdir runs/l2_sp --data folder:PATH

Source: Li et al. 2018, arXiv:1802.01483. The penalties 0.1/2·|w - w0|² on the body and 0.01/2·|w|²
on the new head replace weight decay. SGD with momentum, batches of 64, 9,000 steps, a tenth of the
learning rate after 6,000. The paper chooses the learning rate (0.005, 0.01 or 0.02) and the
strength on the body by validation. Every layer trains, so all norm layers are in mode `train_all`;
the penalty covers them too.

Differences from the source: a random resized crop replaces the random crop, and validation uses one
crop per image. The paper finds L2-SP ahead of plain weight decay on data near ImageNet.

Not measured here.
"""

from jaxft import L2SP, SGD, Recipe, Stage
from jaxft.optim.schedules import MultiStepLR

recipe = Recipe(
    model="resnet101",
    weights="hf:timm/resnet101.tv_in1k",
    data="folder:data/dogs",
    optimizer=SGD(momentum=0.9),
    batch_size=64,
    stages=(
        Stage(
            "all",
            train={"*": 0.01},
            steps=9000,
            schedule=MultiStepLR((6000,), by="step"),
            anchor=L2SP(body=0.1, head=0.01),
            restore="last",
        ),
    ),
)
