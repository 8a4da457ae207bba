"""Trains all of a ResNet-18 on hot dogs, its head at ten times the learning rate: d2l's chapter.

    python scripts/finetune.py configs/d2l_hotdog.py --workdir runs/hotdog --data folder:PATH/hotdog

Source: Zhang et al., "Dive into Deep Learning", section "Fine-Tuning" (d2l.ai), the PyTorch code.
SGD without momentum on the *summed* loss of a batch, so that the learning rates look small: with
batches of 128 images, 5e-5 on the sum is 6.4e-3 on the mean. The new head is initialised by
Xavier's rule; test images are squashed to 256x256. Every layer trains, so all norm layers are in
mode `train_all`.

Data: d2l's hotdog.zip, two classes, train/ with 2,000 images and test/ with 800.

Not measured here. Expect the test accuracy on d2l's page.
"""

from jaxft import SGD, Recipe, Stage

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    head="xavier",
    data="folder:data/hotdog",
    val_split="test",
    optimizer=SGD(weight_decay=1e-3),
    batch_size=128,
    reduction="sum",
    image_size=224,
    resize_size=256,
    resize_mode="squash",
    stages=(Stage("all", train={"fc": 5e-4, "*": 5e-5}, epochs=5, restore="last"),),
)
