"""The literals of `Stage` and `Recipe` fields, for stages, data and networks alike.

They are apart from `jaxft.stages`, so that `jaxft.data` does not depend on training.
"""

from typing import Literal

Augment = Literal[
    "none", "crop_flip", "shift", "shift_flip", "flip", "jitter", "randaugment", "trivialaugment"
]
"""Training augmentation.

- `none`: the evaluation view.
- `crop_flip`: a random box scaled to the input size, mirrored with probability 1/2, as in
  torchvision's ImageNet training, its transfer-learning tutorial and d2l.
- `shift`: the evaluation view, shifted by up to 1/8 of its size.
- `shift_flip`: `shift`, mirrored with probability 1/2. At 32 pixels this is CIFAR's pad by 4, crop
  and flip.
- `flip`: the evaluation view, mirrored with probability 1/2.
- `jitter`: `crop_flip`, then color jitter of up to 40 %.
- `randaugment`, `trivialaugment`: `crop_flip`, then the policy of that name as in torchvision's
  reference training.

Random erasing, mixup, CutMix and label smoothing act on normalised batches on the device, see
`jaxft.data.random_erasing` and `jaxft.data.mixup`.
"""

Balance = Literal["none", "loss", "sampling"]
"""Compensation for classes of unequal size.

- `none`: none; each image counts once per epoch.
- `loss`: the loss weights images by `jaxft.data.class_balance.class_weights`.
- `sampling`: an epoch draws as many images as there are, with replacement, by
  `jaxft.data.class_balance.balanced_draws`.
"""

NormChoice = Literal["batch", "frozen_eval", "train_all", "frozen_batch", "eval"]
"""Statistics that norm layers normalise with (batch or running), and whether training updates the
running ones.

|                | frozen layers          | layers that train      | as in                        |
|----------------|------------------------|------------------------|------------------------------|
| `batch`        | batch, running updated | batch, running updated | PyTorch's tutorial           |
| `frozen_eval`  | running                | batch, running updated | Keras, timm, detection       |
| `train_all`    | none: all must train   | batch, running updated | fastai                       |
| `frozen_batch` | batch                  | batch, running updated | Lightning, `train_bn=False`  |
| `eval`         | running                | running                | LP-FT, surgical fine-tuning  |

A layer with neither scale nor bias, as in a user's network, counts as frozen.
"""
