"""Trains the head, then everything: fastai's `vision_learner(dls, resnet34).fine_tune(4)`.

    python scripts/finetune.py configs/fastai_fine_tune.py --workdir runs/pets

Source: fastai v2, `Learner.fine_tune` with its defaults (base_lr 2e-3, freeze_epochs 1) and
`create_head`: maximum and mean of each channel, two linear layers, dropout 0.25 and 0.5. One cycle
per stage, Adam with decoupled weight decay, no decay of norms and biases. As in fastai, the norm
layers of the frozen body train at a tenth of the head's learning rate: norm mode `train_all` in
both stages.

Difference from the source: fastai's augmentation (rotation, zoom, warp, lighting) is replaced by a
random resized crop and a flip.

Data: images in data/pets/<class>/. A fifth of them validates (fastai's `valid_pct=0.2`).

Not measured here. Expect fastai's results on the same images, apart from the augmentation.
"""

from jaxft import Recipe
from jaxft.strategies import discriminative

recipe = Recipe(
    model="resnet34",
    weights="hf:timm/resnet34.tv_in1k",
    concat_pool=True,
    dropout=0.5,
    data="folder:data/pets",
    batch_size=64,
    stages=discriminative(
        [("conv1", "bn1", "layer1", "layer2"), ("layer3", "layer4"), "fc"],
        low=1e-5,
        high=1e-3,
        epochs=4,
        train_norms=("**.bn*", "**.downsample.1"),
        norms="train_all",
    ),
)
