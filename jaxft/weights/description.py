"""Description of the network that weights belong to: its name, options and class names."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxft.errors import WeightsError
from jaxft.models.model import STORED_OPTIONS, Model

MARK = "stride_in_1x1"
"""Name of the marker tensor in weights files of networks with this option.

Software that does not know the option refuses the unexpected tensor.
"""
STRIDES = (
    "With stride_in_1x1 the file has a tensor of that name, so that torchvision and timm, whose "
    "networks stride in the 3x3 convolution, refuse it. The README shows how to load it there."
)

_METADATA_KEY = "jaxft"  # in a safetensors file
# Options that change the outputs while the tensors stay the same. Dropout, which acts in training
# only, and dtype, which only rounds, may differ between the weights and the network.
_BODY_OPTIONS = ("stride_in_1x1",)
_HEAD_OPTIONS = ("concat_pool", "head_layers", "binary")


@dataclass(frozen=True)
class Description:
    """Description of a network. Each field may be unknown.

    Attributes:
      model: Name in jaxft's registry, or class name of a user's module.
      options: Keyword arguments of `jaxft.models.create`.
      classes: Class names in the order of the logits.
      pixels: `float32` if the network takes images that are normalised already.
      multi_label: Whether an image may have several labels.
      tta, matmul_precision: As in the recipe, for the same logits as in validation.
    """

    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    pixels: str | None = None
    multi_label: bool | None = None
    tta: Any = None
    matmul_precision: Any = None

    def with_defaults(self, other: "Description") -> "Description":
        """Returns this description, with unknown fields taken from `other`."""
        values = {
            field.name: getattr(other, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        return replace(self, **values, options={**other.options, **self.options})


def fields(model: Model, classes: Sequence[str] | None) -> dict[str, Any]:
    """Returns the description as JSON, for `model.json`, safetensors and Orbax metadata."""
    class_entry = {} if classes is None else {"classes": list(classes)}
    return {"model": model.name, **json.loads(json.dumps(dict(model.options))), **class_entry}


def metadata(model: Model, classes: Sequence[str] | None) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    description = json.dumps(fields(model, classes), ensure_ascii=False)
    return {"format": "pt" if model.key_map else "flax", _METADATA_KEY: description}


def from_metadata(metadata: Mapping[str, str] | None) -> Description:
    """Returns the description in a safetensors file's metadata; empty for files of other tools."""
    try:
        return parse(json.loads((metadata or {})[_METADATA_KEY]))
    except (KeyError, ValueError):
        return Description()


def parse(content: Any) -> Description:
    """Parses the JSON of jaxft's `model.json`, or timm's or transformers' `config.json`."""
    if not isinstance(content, Mapping):
        return Description()
    options = {name: content[name] for name in STORED_OPTIONS if name in content}
    if content.get("layer_type") == "bottleneck" and "downsample_in_bottleneck" in content:
        options[MARK] = bool(content["downsample_in_bottleneck"])  # in transformers
    model = content.get("model", content.get("architecture"))  # in jaxft, in timm
    return Description(
        model if isinstance(model, str) else None,
        options,
        _class_names(content),
        *(content.get(name) for name in ("pixels", "multi_label", "tta", "matmul_precision")),
    )


def check_options(options: Mapping[str, Any], model: Model, source: str, *, keep: bool) -> None:
    """Checks that `model` has the options of the weights' network.

    Args:
      options: Options of the weights' network, as far as they are known.
      model: Network to load the weights into.
      source: Name of the weights, for the message.
      keep: Also check the options of the head, because the head is kept.

    Raises:
      WeightsError: An option differs, so that the same tensors would give other outputs.
    """
    model_options = json.loads(json.dumps(dict(model.options)))
    names = (*_BODY_OPTIONS, *(_HEAD_OPTIONS if keep else ()))
    known = {n: options[n] for n in names if n in options and n in model_options}
    known = json.loads(json.dumps(known))
    if differing := [name for name, value in known.items() if value != model_options[name]]:
        expected = ", ".join(f"{name}={known[name]!r}" for name in differing)
        actual = ", ".join(f"{name}={model_options[name]!r}" for name in differing)
        raise WeightsError(
            f"{source} has the weights of a network with {expected}, but this {model.name} has "
            f"{actual} and would compute other outputs from them. Build it with {expected}."
        )


def _class_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    timm_config = content.get("pretrained_cfg")
    names = content.get("classes") or content.get("label_names") or content.get("id2label")
    if not names and isinstance(timm_config, Mapping):
        names = timm_config.get("label_names")
    try:
        if isinstance(names, Mapping):  # by index
            by_index = {int(index): name for index, name in names.items()}
            names = [by_index[index] for index in range(len(by_index))]
    except (KeyError, ValueError):  # some outputs have no name
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if names == [f"LABEL_{index}" for index in range(len(names))]:  # transformers' placeholders
        return None
    return tuple(names) or None
