"""Trains the head on cats and dogs, then everything at a very low learning rate: Keras' guide.

    python scripts/finetune.py configs/keras_guide.py --workdir runs/cats_dogs

Source: "Transfer learning & fine-tuning", keras.io/guides, the end-to-end example. One logit after
dropout, Adam at 1e-3 for two epochs, then everything at 1e-5 for one. The guide calls the body with
`training=False`, so its norm layers always use running statistics: mode `frozen_eval` while they
are frozen, mode `eval` when they train.

Differences from the source: the network is a ResNet-50, not Xception. Images are mirrored, not
rotated. Keras adds Adam's eps to the root of the uncorrected moment and starts the head's bias at
zero.

Data: Microsoft's PetImages (Cat/ and Dog/, some files are damaged). 40 % of the images train, the
next 10 % validate.

Not measured here. Expect the head stage to reach nearly the final accuracy, as ImageNet has classes
of both animals.
"""

from jaxft import Adam, Recipe, Stage

recipe = Recipe(
    model="resnet50",
    weights="hf:timm/resnet50.tv_in1k",
    head="xavier",
    binary=True,
    dropout=0.2,
    data="folder:data/PetImages",
    train_split="train[:40%/class]",
    val_split="train[40%:50%/class]",
    on_bad_image="skip",
    optimizer=Adam(eps=1e-7),
    batch_size=64,
    augment="flip",
    image_size=150,
    resize_size=150,
    resize_mode="squash",
    stages=(
        Stage("head", train={"fc": 1e-3}, epochs=2, restore="last", norms="frozen_eval"),
        Stage("all", train={"*": 1e-5}, epochs=1, restore="last", norms="eval"),
    ),
)
