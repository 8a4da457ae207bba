"""PyTorch stages, and changes to them that `test_parity.py` must find."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional
from torch_network import ResNet

from jaxft import parity


def network():
    torch.manual_seed(0)
    return ResNet()


def begin_head(module, _, make=torch.optim.SGD):
    module.train()
    for name, p in module.named_parameters():
        p.requires_grad = name.startswith("fc.")
    if make is torch.optim.SGD:
        return make(module.fc.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    return make(module.fc.parameters(), lr=0.02)


def unfreeze_body(module):
    for p in module.parameters():
        p.requires_grad = True
    return [p for name, p in module.named_parameters() if not name.startswith("fc.")]


def extend_optimizer(module, optimizer):
    optimizer.add_param_group({"params": unfreeze_body(module), "lr": 0.01})
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    optimizer.param_groups[0]["lr"] = 0.02
    return optimizer


def renew_optimizer(module, _):
    groups = [{"params": module.fc.parameters()}, {"params": unfreeze_body(module), "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def late_step_lr(optimizer):
    scheduler = step_lr(optimizer)
    optimizer.step()  # changes nothing yet, and avoids torch's warning
    scheduler.step()
    return scheduler


STAGES = [parity.TorchStage(begin_head, scheduler=step_lr), parity.TorchStage(extend_optimizer)]


class BiasedNorm(nn.BatchNorm2d):
    """Batch norm that updates the running variance with the biased variance, as Flax does."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


class DecayAfterMomentum(torch.optim.Optimizer):
    """SGD that adds weight decay to the update instead of the gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum_buffer"] = 0.9 * state.get("momentum_buffer", 0.0) + p.grad
                p -= group["lr"] * (state["momentum_buffer"] + 0.01 * p)


class EpsInsideRoot(torch.optim.Optimizer):
    """Adam that divides by sqrt(v + eps)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                state["exp_avg"] = 0.9 * state.get("exp_avg", 0.0) + 0.1 * p.grad
                squares = 0.999 * state.get("exp_avg_sq", 0.0) + 0.001 * p.grad.square()
                state["exp_avg_sq"] = squares
                mean, square = state["exp_avg"] / (1 - 0.9**t), squares / (1 - 0.999**t)
                p -= group["lr"] * mean / (square + 1e-8).sqrt()


class SamePadding(nn.Conv2d):
    """Strided convolution with TensorFlow's SAME padding: none at the top and left."""

    def forward(self, x):
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, self.weight, None, self.stride)


def use_biased_norms(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = BiasedNorm


def use_same_padding(module):
    module.layer2[0].conv1.__class__ = SamePadding


def head_stage(make):
    return [parity.TorchStage(lambda module, _: begin_head(module, _, make), scheduler=step_lr)]


def unchanged(module):
    pass


PLANTED = {
    # case: (change of the module, PyTorch stages)
    "biased running variance": (use_biased_norms, STAGES),
    "decay after momentum": (unchanged, head_stage(DecayAfterMomentum)),
    "eps inside the root": (unchanged, head_stage(EpsInsideRoot)),
    "schedule off by one": (
        unchanged,
        [parity.TorchStage(begin_head, scheduler=late_step_lr), STAGES[1]],
    ),
    "SAME padding": (use_same_padding, STAGES),
    "state not carried": (unchanged, [STAGES[0], parity.TorchStage(renew_optimizer)]),
    "one more parameter trains": (unchanged, STAGES),
    "a summed loss": (unchanged, STAGES),
    "a penalty": (
        unchanged,
        [replace(STAGES[0], penalty=lambda module: 0.1 * module.fc.weight.square().sum())],
    ),
}
