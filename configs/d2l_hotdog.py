"""d2l's fine-tuning chapter: hot dogs or other food, all of a ResNet-18, the head faster.

    python scripts/finetune.py configs/d2l_hotdog.py --workdir runs/hotdog --data folder:PATH/hotdog

Source: Zhang et al., "Dive into Deep Learning", section "Fine-Tuning" (d2l.ai), the PyTorch code.
SGD without momentum on the *summed* loss of a batch, so that its rates look small: at batch 128,
5e-5 is 6.4e-3 on the mean. New head by Xavier's rule; test images squashed to 256x256. Everything
trains, so all norm layers are in mode C.

The data are d2l's hotdog.zip: train/ with 2,000 images, test/ with 800, two classes. Expect the
test accuracy that d2l's page shows. Measured here: nothing.
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
    stages=(Stage("all", train={"fc": 5e-4, "*": 5e-5}, epochs=5, hand_on="last"),),
)
