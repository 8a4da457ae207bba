"""The description of a network that travels with its weights: name, options, classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.errors import WeightsError
from jaxft.models.model import OPTIONS, Model

MARK = "stride_in_1x1"
"""A tensor in the files of networks with that option: what knows nothing of it refuses them."""
STRIDES = (
    "With stride_in_1x1 the file has a tensor of that name, so that torchvision and timm, whose\n"
    "networks stride elsewhere, do not load it strictly: README says how they do."
)

_KEY = "jaxft"  # in a safetensors file's metadata
# Options that change what the same tensors compute. Dropout acts in training alone, and a dtype
# rounds: weights may well be used with others.
_OF_BODY = ("stride_in_1x1",)
_OF_HEAD = ("concat_pool", "head_layers", "binary")


@dataclass(frozen=True)
class Description:
    """What is known of the network whose weights these are; each may be unknown.

    Attributes:
      model: its name in jaxft's registry, or the class of a user's module.
      options: keyword arguments of `jaxft.models.create`.
      classes: names of its logits, in their order.
    """

    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None

    def completed(self, other: "Description") -> "Description":
        """Returns this description, with what it leaves open as the other has it."""
        options = {**other.options, **self.options}
        return Description(self.model or other.model, options, self.classes or other.classes)


def fields(model: Model, classes: Sequence[str] | None) -> dict[str, Any]:
    """Returns the JSON that `model.json`, safetensors files and Orbax checkpoints hold."""
    named = {} if classes is None else {"classes": list(classes)}
    return {"model": model.name, **json.loads(json.dumps(dict(model.options))), **named}


def metadata(model: Model, classes: Sequence[str] | None) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    described = json.dumps(fields(model, classes), ensure_ascii=False)
    return {"format": "pt" if model.torch_named else "flax", _KEY: described}


def from_metadata(metadata: Mapping[str, str] | None) -> Description:
    """Reads what `metadata` wrote; a file of anyone else's describes nothing."""
    try:
        return parse(json.loads((metadata or {})[_KEY]))
    except (KeyError, ValueError):
        return Description()


def parse(said: Any) -> Description:
    """Reads the JSON of a file: ours, timm's `config.json` or transformers'."""
    if not isinstance(said, Mapping):
        return Description()
    options = {name: said[name] for name in OPTIONS if name in said}
    if said.get("layer_type") == "bottleneck" and "downsample_in_bottleneck" in said:
        options[MARK] = bool(said["downsample_in_bottleneck"])  # transformers'
    name = said.get("model", said.get("architecture"))  # ours, timm's
    return Description(name if isinstance(name, str) else None, options, _classes(said))


def check_options(options: Mapping[str, Any], model: Model, source: str, *, keep: bool) -> None:
    """Raises WeightsError where weights are of a network with other options than `model`.

    Of its body's; with `keep` of its head's too.
    """
    ours = json.loads(json.dumps(dict(model.options)))
    names = (*_OF_BODY, *(_OF_HEAD if keep else ()))
    theirs = json.loads(json.dumps({n: options[n] for n in names if n in options and n in ours}))
    if other := [name for name, value in theirs.items() if value != ours[name]]:
        was = ", ".join(f"{name}={theirs[name]!r}" for name in other)
        here = ", ".join(f"{name}={ours[name]!r}" for name in other)
        raise WeightsError(
            f"{source} has the weights of a network with {was}, and this {model.name} is one with "
            f"{here}: with the same tensors it would compute something else. Build it with {was}."
        )


def _classes(said: Mapping[str, Any]) -> tuple[str, ...] | None:
    of_timm = said.get("pretrained_cfg")
    names = said.get("classes") or said.get("label_names") or said.get("id2label")
    if not names and isinstance(of_timm, Mapping):
        names = of_timm.get("label_names")
    try:
        if isinstance(names, Mapping):  # by index
            by_index = {int(index): name for index, name in names.items()}
            names = [by_index[index] for index in range(len(by_index))]
    except (KeyError, ValueError):  # not of all outputs
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if names == [f"LABEL_{index}" for index in range(len(names))]:  # transformers' for unknown
        return None
    return tuple(names) or None
