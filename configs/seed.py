"""Trains the head, then layer4 with it at a tenth of the learning rate, then everything.

    python scripts/finetune.py configs/seed.py --workdir runs/seed

Source: the usual two-stage PyTorch script. It sets `requires_grad` to False for the body and trains
`fc` with SGD; then it trains `layer4` and `fc` with a new SGD. The third stage is optional in such
scripts. Norm mode `batch`, PyTorch's default: frozen norm layers normalise with the batch, and
their running statistics are updated.

Measured with an ImageNet ResNet-50 at 160 pixels for two epochs a stage: accuracy 0.871
(0.863-0.876 over 3 seeds). PyTorch reaches 0.887 (0.869-0.902), see jaxft/parity/README.md.
"""

from jaxft import SGD, Recipe, Stage

recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    batch_size=32,
    stages=(
        Stage("head", train={"fc": 1e-3}, epochs=5, norms="batch"),
        Stage("late", train={"fc": 1e-3, "layer4": 1e-4}, epochs=5, norms="batch"),
        Stage("all", train={"fc": 1e-3, "layer4": 1e-4, "*": 1e-5}, epochs=5, norms="batch"),
    ),
)
