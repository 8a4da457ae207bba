"""LP-FT: a linear probe, solved, then everything from there at a low rate.

    python scripts/finetune.py configs/lp_ft.py --workdir runs/lp_ft \\
        --data folder:PATH/hymenoptera --weights PATH/resnet50_imagenet.safetensors

Source: Kumar et al. 2022, arXiv:2202.10054: scikit-learn's logistic regression on the features, its
penalty chosen by validation; then SGD with momentum 0.9, no decay, cosine, 20 epochs, batches of
64. Norm mode E: running statistics throughout. The rate is to be swept: the paper took the best of
several from 3e-7 to 1e-2, such as `--stages.1.train.* 1e-3`. Its authors divide the features by
one standard deviation first, which moves the sweep of penalties and not what it can find.

Data and weights are as in hymenoptera_resnet50.py; for torchvision's weights add
`--stride-in-1x1 False`.

Measured on 2 CPU cores, the probe alone: accuracy 0.987, loss 0.115, with the penalty C = 0.01. Its
coefficients are scikit-learn's to 6e-9 (by newton-cg; its lbfgs itself is off by up to 4e-6). The
20 epochs after it have not been measured.
"""

from jaxft import Recipe, methods, models

recipe = Recipe(
    model="resnet50",
    stride_in_1x1=True,
    weights="resnet50_imagenet.safetensors",
    data="folder:data/hymenoptera",
    batch_size=64,
    stages=methods.linear_probe_then_finetune(
        models.create("resnet50").block_patterns, lr=1e-4, epochs=20
    ),
)
