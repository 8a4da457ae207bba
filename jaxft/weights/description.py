"""The description of a network that travels with its weights: name, options, classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.models.model import OPTIONS, Model

_KEY = "jaxft"  # in a safetensors file's metadata


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
    name = said.get("model") if isinstance(said.get("model"), str) else None
    return Description(name, options, _classes(said))


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
