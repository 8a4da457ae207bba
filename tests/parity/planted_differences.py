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


def head(module, _, make=torch.optim.SGD):
    module.train()
    for name, p in module.named_parameters():
        p.requires_grad = name.startswith("fc.")
    if make is torch.optim.SGD:
        return make(module.fc.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    return make(module.fc.parameters(), lr=0.02)


def body(module):
    for p in module.parameters():
        p.requires_grad = True
    return [p for name, p in module.named_parameters() if not name.startswith("fc.")]


def joined(module, optimizer):
    optimizer.add_param_group({"params": body(module), "lr": 0.01})
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    optimizer.param_groups[0]["lr"] = 0.02
    return optimizer


def renewed(module, _):
    groups = [{"params": module.fc.parameters()}, {"params": body(module), "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def late_step_lr(optimizer):
    scheduler = step_lr(optimizer)
    optimizer.step()  # changes nothing yet, and spares us torch's warning
    scheduler.step()
    return scheduler


STAGES = [parity.TorchStage(head, scheduler=step_lr), parity.TorchStage(joined)]


class BiasedNorm(nn.BatchNorm2d):
    """Its running variance moves towards the biased one, as Flax's does."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


class DecayAfterMomentum(torch.optim.Optimizer):
    """SGD whose decay joins the update, not the momentum."""

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
    """A strided convolution padded by TensorFlow's rule: not at all at the top and left."""

    def forward(self, x):
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, self.weight, None, self.stride)


def biased_norms(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = BiasedNorm


def same_padding(module):
    module.layer2[0].conv1.__class__ = SamePadding


def by(make):
    return [parity.TorchStage(lambda module, _: head(module, _, make), scheduler=step_lr)]


def nothing(module):
    pass


PLANTED = {
    # how the module is changed, and the PyTorch stages
    "biased running variance": (biased_norms, STAGES),
    "decay after momentum": (nothing, by(DecayAfterMomentum)),
    "eps inside the root": (nothing, by(EpsInsideRoot)),
    "schedule off by one": (
        nothing,
        [parity.TorchStage(head, scheduler=late_step_lr), STAGES[1]],
    ),
    "SAME padding": (same_padding, STAGES),
    "state not carried": (nothing, [STAGES[0], parity.TorchStage(renewed)]),
    "one more parameter trains": (nothing, STAGES),
    "a summed loss": (nothing, STAGES),
    "a penalty": (
        nothing,
        [replace(STAGES[0], penalty=lambda module: 0.1 * module.fc.weight.square().sum())],
    ),
}
