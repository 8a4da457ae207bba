"""Records steps of torch for tests/train/test_norm_modes.py and test_step_options.py.

    python tests/record_stage_steps.py

Needs torch; recorded with torch 2.13.0, in float64.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "train")]

import test_norm_modes  # noqa: E402
import test_step_options  # noqa: E402
from float64_stages import OPTIMIZER, ROWS, STEPS, rows, samples  # noqa: E402
from record_ddp import network  # noqa: E402
from test_ddp import normalized  # noqa: E402


def norms(module, *names):
    """The norm layers of these parts; without names, all."""
    parts = [module.get_submodule(name) for name in names] or [module]
    return [
        layer
        for part in parts
        for layer in part.modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
    ]


def lightning_freeze(module, *names):
    """`BaseFinetuning.freeze(train_bn=False)`: batch statistics, no running ones."""
    for layer in norms(module, *names):
        layer.track_running_stats = False


def lightning_thaw(module, *names):
    """`BaseFinetuning.make_trainable`."""
    for layer in norms(module, *names):
        layer.track_running_stats = True


BODY = ("bn1", "layer1", "layer2")  # what is frozen, where layer3 trains


def _eval_frozen(module):
    for layer in norms(module.train(), *BODY):
        layer.eval()


def _mapped(module):
    module.eval().layer3.train()


def _thawed(module):
    lightning_thaw(module.train(), "layer3")


# What is done to a network in train mode before each stage of a case.
MODES = {
    "batch": [lambda module: module.train()],
    "frozen_eval": [_eval_frozen],
    "train_all": [lambda module: module.train()],
    "frozen_batch": [lambda module: lightning_freeze(module.train(), *BODY)],
    "eval": [lambda module: module.eval()],
    "mapped": [_mapped],
    "thawed": [lambda module: lightning_freeze(module.train()), _thawed],
}
TRAINS = {
    "fc": lambda name: name.startswith("fc."),
    "layer3": lambda name: name.startswith("layer3."),
    "layer2": lambda name: name.startswith("layer2."),
    "**.bn*": lambda name: "bn" in name,
    "layer3.0.conv*": lambda name: name.startswith("layer3.0.conv"),
    "*": lambda name: True,
}


def record(stages, modes):
    """What `float64_stages.train` returns, by torch."""
    module = network()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    for index, (stage, mode) in enumerate(zip(stages, modes, strict=True)):
        mode(module)
        groups = {pattern: [] for pattern in stage.train}
        for name, p in module.named_parameters():
            pattern = next((x for x in groups if TRAINS[x](name)), None)
            p.requires_grad_(pattern is not None)
            if pattern:
                groups[pattern].append(p)
        optimizer = torch.optim.SGD(
            [{"params": groups[pattern], "lr": rate} for pattern, rate in stage.train.items()],
            momentum=OPTIMIZER.momentum,
        )
        average = AveragedModel(
            module, multi_avg_fn=get_ema_multi_avg_fn(stage.ema or 0.0), use_buffers=True
        )
        average.n_averaged.fill_(1)  # the copy that it begins with counts
        found = {f"norms/{pattern}": [] for pattern in groups} | {"losses": []}
        for number in range(index * STEPS, (index + 1) * STEPS):
            optimizer.zero_grad()
            found["losses"].append(backward(module, stage, number, start))
            for pattern, members in groups.items():
                squares = [p.grad.square().sum() for p in members]
                found[f"norms/{pattern}"].append(sum(squares).sqrt().item())
            if stage.clip_value:
                torch.nn.utils.clip_grad_value_(module.parameters(), stage.clip_value)
            if stage.clip_norm:
                torch.nn.utils.clip_grad_norm_(module.parameters(), stage.clip_norm)
            optimizer.step()
            average.update_parameters(module)
        yield f"{index}/end", samples(tensors(module))
        if stage.ema:
            yield f"{index}/average", samples(tensors(average.module))
        for name, values in found.items():
            yield f"{index}/{name}", np.array(values)


def backward(module, stage, number, start):
    """Gradients of a step, as a loop in torch has them; the loss without the anchor's penalty."""
    image, target = rows(number)
    images = torch.from_numpy(normalized(image).transpose(0, 3, 1, 2)).double()
    target = torch.from_numpy(target).long()
    weight = stage.class_weights and torch.tensor(stage.class_weights).double()
    # Of the whole batch: the mean of its parts' means would weigh a short last part too much.
    total = len(target) if weight is None else weight[target].sum()
    smoothing = stage.label_smoothing or 0.0
    size, value = ROWS // stage.accumulate, 0.0
    for part, classes in zip(images.split(size), target.split(size), strict=True):
        loss = cross_entropy(
            module(part), classes, weight=weight, label_smoothing=smoothing, reduction="sum"
        )
        (loss / total).backward()
        value += (loss / total).item()
    if stage.anchor:
        penalty(module, stage.anchor, start).backward()
    return value


def penalty(module, anchor, start):
    """Of L2-SP: alpha / 2 of the squared distance for the body, beta / 2 of the head's square."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    head = sum(p.square().sum() for name, p in trained if name.startswith("fc."))
    body = sum((p - start[n]).square().sum() for n, p in trained if not n.startswith("fc."))
    return anchor.body / 2 * body + anchor.head / 2 * head


def tensors(module):
    """All but `num_batches_tracked`."""
    return {name: x for name, x in module.state_dict().items() if x.ndim}


def recorded(cases):
    """By `case/stage/name`."""
    return {
        f"{case}/{name}": array
        for case, stages in cases.items()
        for name, array in record(stages, MODES.get(case, [torch.nn.Module.train] * len(stages)))
    }


if __name__ == "__main__":
    for tests in (test_norm_modes, test_step_options):
        np.savez_compressed(tests.GOLDEN, **recorded(tests.CASES))
        print(tests.GOLDEN.name, f"{tests.GOLDEN.stat().st_size >> 10} KiB")
