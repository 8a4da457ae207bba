"""LP-FT: a linear probe, solved, then everything from there.

    python scripts/finetune.py configs/lp_ft.py --workdir runs/lp_ft \\
        --data folder:PATH --weights PATH

Source: Kumar et al. 2022, arXiv:2202.10054.
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
