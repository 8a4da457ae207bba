"""The words a stage chooses from, apart from what they stand for.

Stages must import without what trains them: images are read in `jaxft.data`, networks run in
`jaxft.models`, and labelling a tree needs neither.
"""

from typing import Literal

Augment = Literal[
    "none", "crop_flip", "shift", "shift_flip", "flip", "jitter", "randaugment", "trivialaugment"
]
"""The training view.

- `none`: the evaluation view.
- `crop_flip`: a random box scaled to the input size, mirrored half of the time. torchvision's
  ImageNet training, its transfer-learning tutorial and d2l's.
- `shift`: the evaluation view moved by up to an eighth.
- `shift_flip`: the same, mirrored half of the time. At 32 pixels that is CIFAR's: pad by 4, crop.
- `flip`: the evaluation view, mirrored half of the time.
- `jitter`, `randaugment`, `trivialaugment`: `crop_flip`, then colours by up to 40 %, or the policy
  of that name as torchvision's reference training has it.

Erasing, mixup and label smoothing act on normalised batches on the device:
`jaxft.data.random_erasing`, `jaxft.data.mixup`.
"""

Balance = Literal["none", "loss", "sampling"]
"""What makes up for classes of unequal size.

- `none`: nothing does; each image counts once an epoch.
- `loss`: images weigh as `class_weights` says.
- `sampling`: an epoch draws as many images as there are with replacement, as `balanced_draws`.
"""

NormChoice = Literal["A", "B", "C", "D", "E"]
"""What norm layers normalise with, and whether their running statistics move.

|   | frozen layers             | layers that train   | as in                                  |
|---|---------------------------|---------------------|----------------------------------------|
| A | batch, running ones move  | batch, running move | PyTorch's tutorial, Finetuning Scheduler |
| B | running                   | batch, running move | Keras, timm, detection                 |
| C | none: all of them train   | batch, running move | fastai, Lightning's `train_bn=True`    |
| D | batch, running ones stay  | batch, running move | Lightning's `train_bn=False`           |
| E | running                   | running             | LP-FT, surgical fine-tuning            |

A layer with neither scale nor bias, as another's network may have, counts as frozen.
"""
