"""The quick start: a small ResNet that knows the digits 0-4 learns 5-9 from few labels.

python scripts/finetune.py configs/quickstart.py --workdir runs/quickstart
"""

from jaxft import Adam, Recipe, Stage

recipe = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=2,
    optimizer=Adam(),
    batch_size=5,
    augment="shift",
    image_size=8,
    resize_size=None,
    mean=(0.3, 0.3, 0.3),
    std=(0.38, 0.38, 0.38),
    stages=(
        Stage("head", train={"fc": 1e-2}, epochs=5, hand_on="last"),
        Stage("late", train={"fc": 1e-3, "layer3": 1e-3}, epochs=10, hand_on="last"),
        Stage("all", train={"*": 1e-3}, epochs=15, hand_on="last"),
    ),
    from_scratch=(Stage("scratch", train={"*": 2e-3}, epochs=30, hand_on="last"),),
)
