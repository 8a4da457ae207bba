"""The recipes of `trajectories.py` in PyTorch, with the hyperparameters of their sources.

Each parameter is one group. This changes nothing for torch's optimizers, and lets each stage group
the parameters differently.
"""

import math

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch_network import ConvNeXt, ResNet, ViT
from trajectories import CASES, EPOCHS, SINGLE_STAGE_EPOCHS, epoch, small_recipe, start, summarize

from jaxft.parity.torch_steps import TorchStage, torch_steps


def network(config):
    """The recipe's network with its initial weights, in float64."""
    module = NETWORKS.get(config, ResNet)().double()
    for name, tensor in module.state_dict().items():
        if tensor.ndim:  # num_batches_tracked has no dimension
            tensor.copy_(torch.from_numpy(start(config, name, tuple(tensor.shape))))
    return module


def lightning_head(c):
    return nn.Sequential(nn.Linear(c, 256), nn.ReLU(), nn.Linear(256, 32), nn.Linear(32, 1))


def fastai_head(c):
    return nn.Sequential(
        *(nn.BatchNorm1d(c), nn.Identity(), nn.Linear(c, 512, bias=False), nn.ReLU()),
        *(nn.BatchNorm1d(512), nn.Identity(), nn.Linear(512, 3, bias=False)),
    )


NETWORKS = {
    "vit_mae": ViT,
    "convnext_finetune": ConvNeXt,
    "dinov2_lp_ft": lambda: ViT(layer_scale=True),
    "bitfit": ViT,
    "vit_gradual_unfreezing": lambda: ViT(depth=9),
    "layer_decay": lambda: ResNet(depth=2),
    "lightning_milestones": lambda: ResNet(bottleneck=True, head=lightning_head),
    "fastai_fine_tune": lambda: ResNet(concat_pool=True, head=fastai_head),
    "keras_guide": lambda: ResNet(bottleneck=True, head=lambda c: nn.Linear(c, 1)),
    **{
        config: lambda: ResNet(bottleneck=True)
        for config in (
            *("lp_ft", "surgical", "bit"),
            *("l2_sp", "torchvision_reference", "torchvision_reference_v2"),
        )
    },
}


def stage(rates, make, *, norms, carry="reset", **rest):
    """A stage that trains the parameters for which `rates(name)` returns options, or the rate.

    `make(groups)` creates its optimizer. With `carry="keep"` it extends the optimizer of the stage
    before by the new groups.
    """

    def begin(module, optimizer):
        groups = []
        for name, parameter in module.named_parameters():
            options = rates(name)
            parameter.requires_grad_(options is not None)
            if options is not None:
                options = options if isinstance(options, dict) else {"lr": options}
                groups.append({"params": [parameter], **options})
        set_norms(module, norms)
        if optimizer is None or carry != "keep":
            return make(groups)
        known = {id(group["params"][0]): group for group in optimizer.param_groups}
        for group in groups:
            if old := known.get(id(group["params"][0])):
                old.pop("initial_lr", None)  # of the last stage's scheduler
                old["lr"] = group["lr"]
            else:
                optimizer.add_param_group(group)
        return optimizer

    return TorchStage(begin, **rest)


def set_norms(module, mode):
    """Calls `train()` or `eval()` and sets `track_running_stats` (as Lightning does) for a mode.

    `mode` is a norm mode, or a function `(name of the layer) -> norm mode`.
    """
    module.train()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer_mode = mode if isinstance(mode, str) else mode(name)
            trains = any(p.requires_grad for p in layer.parameters())
            layer.train(not (layer_mode == "eval" or (layer_mode == "frozen_eval" and not trains)))
            layer.track_running_stats = not (layer_mode == "frozen_batch" and not trains)


def sgd(**options):
    return lambda groups: SGD(groups, momentum=0.9, **options)


def seed(norms, carry):
    def rates(**of_part):
        rest = of_part.pop("rest", None)
        return lambda name: of_part.get(name.split(".")[0], rest)

    return [
        stage(rates(fc=1e-3), sgd(), norms=norms, carry=carry),
        stage(rates(fc=1e-3, layer4=1e-4), sgd(), norms=norms, carry=carry),
        stage(rates(fc=1e-3, layer4=1e-4, rest=1e-5), sgd(), norms=norms, carry=carry),
    ]


def step_lr(size):
    return lambda optimizer: lr_scheduler.StepLR(optimizer, size, gamma=0.1)


def pytorch_tutorial_finetune():
    return [stage(lambda name: 1e-3, sgd(), norms="train_all", scheduler=step_lr(7))]


def pytorch_tutorial_extractor():
    return [stage(only_fc(1e-3), sgd(), norms="batch", scheduler=step_lr(7))]


def only_fc(rate):
    return lambda name: rate if name.startswith("fc.") else None


def d2l_hotdog():
    def summed(module, images, targets):
        return cross_entropy(module(images), targets, reduction="none").sum()

    return [
        stage(
            lambda name: 5e-4 if name.startswith("fc.") else 5e-5,
            lambda groups: SGD(groups, weight_decay=0.001),
            norms="train_all",
            loss=summed,
        )
    ]


def bce(module, images, targets):
    return binary_cross_entropy_with_logits(module(images)[:, 0], targets.to(images.dtype))


def lightning_milestones():
    def convolutions(name):
        return "conv" in name or "downsample.0" in name

    def head(name):
        return 1e-3 if name.startswith("fc.") else None

    def layers(name):
        if name.startswith("layer"):
            return 1e-5 if convolutions(name) else None
        return 1e-4 if name.startswith("fc.") else None

    def every(name):
        if name.startswith("fc."):
            return 1e-5
        return 1e-6 if convolutions(name) else None

    # Norm layers never train; the statistics of an unfrozen layer are updated.
    modes = [
        "frozen_batch",
        lambda name: "batch" if name.startswith("layer") else "frozen_batch",
        "batch",
    ]
    return [
        stage(rates, Adam, norms=mode, carry="keep", loss=bce)
        for rates, mode in zip((head, layers, every), modes, strict=True)
    ]


def fastai_fine_tune():
    def options(name, rate):
        decays = not is_norm(name) and not name.endswith("bias")
        return {"lr": rate, "weight_decay": 0.01 if decays else 0.0}

    def is_norm(name):
        norm = "bn" in name or "downsample.1" in name
        return norm or name.startswith(("fc.0.", "fc.4."))

    def frozen(name):
        if name.startswith("fc."):
            return options(name, 2e-3)
        return options(name, 2e-3 / 10) if is_norm(name) else None

    def unfrozen(name):
        base = 1e-3
        if name.startswith("fc."):
            return options(name, base)
        late = name.startswith(("layer3", "layer4"))
        return options(name, base / 10 if late else base / 100)

    def adam(groups):
        return AdamW(groups, betas=(0.9, 0.99), eps=1e-5)

    return [
        stage(
            frozen, adam, norms="train_all",
            scheduler=lambda o: FastaiOneCycle(o, pct=0.99, div=25.0), by="step",
        ),
        stage(
            unfrozen, adam, norms="train_all",
            scheduler=lambda o: FastaiOneCycle(o, pct=0.3, div=5.0), by="step",
        ),
    ]  # fmt: skip


class ByFormula:
    """A scheduler that sets the optimizer's values for step t before the step."""

    total = 2 * EPOCHS

    def __init__(self, optimizer):
        self.optimizer, self.t = optimizer, 0
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.set_values()

    def step(self):
        """Advances to the next step."""
        self.t += 1
        self.set_values()


class FastaiOneCycle(ByFormula):
    def __init__(self, optimizer, pct, div):
        self.pct, self.div = pct, div
        super().__init__(optimizer)

    def set_values(self):
        x = self.t / self.total
        rises = x <= self.pct
        done = x / self.pct if rises else (x - self.pct) / (1 - self.pct)
        done = (1 - math.cos(math.pi * done)) / 2
        for peak, group in zip(self.peaks, self.optimizer.param_groups, strict=True):
            low, high = (peak / self.div, peak) if rises else (peak, peak / 1e5)
            group["lr"] = low + (high - low) * done
            low, high = (0.95, 0.85) if rises else (0.85, 0.95)
            group["betas"] = (low + (high - low) * done, group["betas"][1])


class SlantedTriangular(ByFormula):
    def set_values(self):
        cut = int(self.total * 0.1)
        t = self.t
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
        for peak, group in zip(self.peaks, self.optimizer.param_groups, strict=True):
            group["lr"] = peak * (1 + p * 31) / 32


def keras_guide():
    def adam(groups):
        return Adam(groups, eps=1e-7)

    return [
        stage(only_fc(1e-3), adam, norms="frozen_eval", loss=bce),
        stage(lambda name: 1e-5, adam, norms="eval", loss=bce),
    ]


def ulmfit():
    order = ["fc", "layer4", "layer3", "layer2", "layer1", "stem"]

    def depth(name):
        part = name.split(".")[0]
        return order.index("stem" if part in ("conv1", "bn1") else part)

    return unfreezing(depth, count=6, lr=0.01)


def unfreezing(depth, count, lr):
    """Stages in which all parameters below a `depth(name)` of 1, 2, ..., `count` train."""

    def below(limit):
        return lambda name: lr / 2.6 ** depth(name) if depth(name) < limit else None

    def adam(groups):
        return Adam(groups, betas=(0.7, 0.99))

    return [
        stage(
            below(limit), adam, norms="frozen_eval", carry="keep",
            scheduler=SlantedTriangular, by="step",
        )
        for limit in range(1, count + 1)
    ]  # fmt: skip


def vit_layer(name):
    """MAE's `get_layer_id_for_vit` for 12 blocks."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else 13


def vit_gradual_unfreezing():
    def depth(name):
        layer = vit_layer(name)
        return 0 if layer == 13 else 3 - max(layer - 1, 0) // 4

    return unfreezing(depth, count=4, lr=1e-3)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, SINGLE_STAGE_EPOCHS)


def lp_ft():
    return [stage(lambda name: 1e-4, sgd(), norms="eval", scheduler=cosine)]


def surgical():
    def first(name):
        return 1e-3 if name.startswith(("conv1.", "layer1.")) else None

    return [stage(first, lambda groups: Adam(groups, weight_decay=1e-4), norms="eval")]


def bit():
    def schedule(optimizer):  # the authors' get_lr with shorter supports
        def factor(step):
            if step < 4:
                return step / 4
            return 0.1 ** sum(support < step for support in (4, 7, 10))

        return lr_scheduler.LambdaLR(optimizer, factor)

    rates = [lambda name: 0.003, sgd()]
    return [stage(*rates, norms="train_all", scheduler=schedule, by="step")]


def l2_sp():
    pretrained = {name: p.detach().clone() for name, p in network("l2_sp").named_parameters()}

    def penalty(module):
        named = list(module.named_parameters())
        body = sum((p - pretrained[n]).square().sum() for n, p in named if n[:3] != "fc.")
        head = sum(p.square().sum() for n, p in named if n[:3] == "fc.")
        return 0.1 / 2 * body + 0.01 / 2 * head

    def drop(optimizer):
        return lr_scheduler.MultiStepLR(optimizer, [8], gamma=0.1)

    return [
        stage(
            lambda name: 0.01 / 8, sgd(), norms="train_all", penalty=penalty,
            scheduler=drop, by="step",
        )
    ]  # fmt: skip


def warm_cosine(epochs):
    """The schedule of torchvision's reference training."""

    def scheduler(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=2)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs - 2)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[2])

    return scheduler


def smoothed(module, images, targets):
    return cross_entropy(module(images), targets, label_smoothing=0.1)


def layer_decay():
    blocks = [f"layer{layer}.{block}." for layer in (4, 3, 2, 1) for block in (1, 0)]
    order = ["fc.", *blocks, ("conv1.", "bn1.")]

    def options(name):
        (depth,) = (i for i, prefix in enumerate(order) if name.startswith(prefix))
        vector = "bn" in name or "downsample.1" in name or name.endswith("bias")
        return {"lr": 1e-3 * 0.75**depth, "weight_decay": 0.0 if vector else 0.05}

    return [
        stage(
            options,
            AdamW,
            norms="train_all",
            loss=smoothed,
            scheduler=warm_cosine(epochs=SINGLE_STAGE_EPOCHS),
        )
    ]


def cosine_by_step(warmup=0):
    """The schedule of MAE and ConvNeXt: `warmup` steps from 0, then a cosine, here to 0."""
    length = 2 * SINGLE_STAGE_EPOCHS

    def factor(step):
        if step < warmup:
            return step / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (length - warmup))) / 2

    return {"scheduler": lambda o: lr_scheduler.LambdaLR(o, factor), "by": "step"}


def vit_mae():
    def options(name):
        spared = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
        return {"lr": 2e-3 * 0.65 ** (13 - vit_layer(name)), "weight_decay": 0 if spared else 0.05}

    return [stage(options, AdamW, norms="train_all", loss=smoothed, **cosine_by_step(warmup=4))]


def convnext_finetune():
    def layer(name):  # the blocks after the third of `stages.2` would be layers 4 and 5
        part, number, *_ = name.split(".")
        return (1, 2, 3, 6)[int(number)] if part == "stages" else {"stem": 0, "head": 7}[part]

    def options(name):
        spared = name.endswith(("bias", "gamma")) or "norm" in name
        spared = spared or name.startswith("stem.1.") or "downsample.0." in name
        return {"lr": 5e-5 * 0.8 ** (7 - layer(name)), "weight_decay": 0 if spared else 1e-8}

    return [stage(options, AdamW, norms="train_all", loss=smoothed, **cosine_by_step())]


def dinov2_lp_ft():
    def options(name):
        spared = name.endswith(("bias", "gamma")) or "norm" in name
        return {"lr": 1e-5, "weight_decay": 0 if spared else 0.05}

    return [stage(options, AdamW, norms="eval", scheduler=cosine)]


def bitfit():
    def rates(name):
        if name.startswith("head."):
            return 1e-3
        return 4e-4 if name.endswith(".bias") else None

    def adamw(groups):
        return AdamW(groups, weight_decay=0)

    return [stage(rates, adamw, norms="frozen_eval", scheduler=cosine)]


def torchvision_reference():
    decayed = sgd(weight_decay=1e-4)
    return [stage(lambda name: 0.1 / 32, decayed, norms="train_all", scheduler=step_lr(3))]


def torchvision_reference_v2():
    def options(name):
        norm = "bn" in name or "downsample.1" in name
        return {"lr": 0.5 / 128, "weight_decay": 0.0 if norm else 2e-5}

    return [
        stage(
            options,
            sgd(),
            norms="train_all",
            loss=smoothed,
            scheduler=warm_cosine(epochs=SINGLE_STAGE_EPOCHS),
        )
    ]


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        *(seed, pytorch_tutorial_finetune, pytorch_tutorial_extractor, d2l_hotdog),
        *(lightning_milestones, fastai_fine_tune, keras_guide, ulmfit, lp_ft, surgical, bit),
        *(l2_sp, layer_decay, torchvision_reference, torchvision_reference_v2),
        *(vit_mae, convnext_finetune, dinov2_lp_ft, bitfit, vit_gradual_unfreezing),
    )
}


def record(case):
    """Trains a case in PyTorch and summarises it; see `trajectories.summarize`."""
    config, norms, carry = CASES[case]
    stages = RECIPES[config](norms, carry) if config == "seed" else RECIPES[config]()
    recipe = small_recipe(config, norms, carry)
    lengths = [2 * stage.epochs for stage in recipe.stages]
    steps = torch_steps(network(config), stages, lengths, epoch(recipe), next_modules={})
    return dict(summarize(steps, lengths))
