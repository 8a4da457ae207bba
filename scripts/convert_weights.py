"""Converts weights, from PyTorch to JAX or back.

    python scripts/convert_weights.py SOURCE OUT --model NAME [--stride-in-1x1] [--concat-pool]

SOURCE: a file of torch's, a run or checkpoint of ours, hf:OWNER/REPO, torchvision:ENUM.MEMBER, ...
OUT: a .safetensors file with torchvision's names and layouts, or else a folder, written as an Orbax
     checkpoint of {"params": ..., "stats": ...} in jaxft's; either one is a SOURCE again.
NAME: the network, such as resnet50; every tensor must fit it, and nothing may be left over.
"""

if __name__ == "__main__":
    import stop_at_once  # noqa: F401, before what takes seconds to import

import argparse

import jax

from jaxft import WeightsError, models, weights
from jaxft.atomic import anywhere
from jaxft.command_line import check_folder, run
from jaxft.weights.orbax import save_weights


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("out", type=anywhere)
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--stride-in-1x1", action="store_true")
    parser.add_argument("--concat-pool", action="store_true")
    arguments = parser.parse_args(given)
    if arguments.out.exists():
        raise WeightsError(f"{arguments.out} exists; choose another OUT, or delete it.")
    if arguments.out.suffix in (".pth", ".pt", ".th", ".bin", ".ckpt"):
        raise WeightsError(
            f"{arguments.out}: torch reads .safetensors too; name OUT so, or give a folder."
        )
    check_folder(arguments.out.parent)
    source = weights.read(arguments.source)
    model = models.create(
        arguments.model,
        num_classes=source.num_classes or 1000,
        stride_in_1x1=arguments.stride_in_1x1,
        concat_pool=arguments.concat_pool,
    )
    params, stats = weights.load(source, model)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".safetensors":
        weights.save(arguments.out, model, params, stats)
    else:
        save_weights(arguments.out, params, stats)
    for remark in source.remarks:
        print(remark)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{arguments.out}: {arguments.model}, {model.num_classes} classes, {count:,} parameters")


if __name__ == "__main__":
    run(main)
