"""KeyMap: how the names in weights files correspond to the names of a network's tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Resize = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""Function of a tensor in torch's layout and the network's shape that returns the resized tensor.

Raises ValueError if the tensor cannot be resized.
"""


Convert = Callable[[dict[str, Any]], dict[str, Any]]
"""Function of a file's tensors by the network's names that returns the network's tensors.

The tensors are `jaxft.weights.tensors.LazyTensor`, so that nothing is read before it is needed.
"""


@dataclass(frozen=True)
class Rename:
    """A rule that renames tensors of a weights file.

    Attributes:
      pattern: regular expression of a whole name in the file.
      name: the network's name for the tensor, in torch's terms; `{0}` is the pattern's first group,
        and `{after0}` that number plus 1.
      parts: values of the pattern's group `part`, which counts in the numbering of the groups.
        Tensors with the same `name` and different parts are concatenated along their first axis in
        this order, such as query, key and value.
    """

    pattern: str
    name: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyMap:
    r"""The names of a network's tensors in weights files of torch and other libraries.

    A tensor is called as in jaxft, but for its last part: `kernel` and `scale` are `weight` in
    torch. `jaxft.weights.key_maps` knows these, and the layouts.

    Attributes:
      renames: rules for other names; the first pattern that matches a name counts. Names that match
        no pattern stay as they are.
      ignored: regular expressions of tensors in the files that the network does not use.
      convert: conversion of tensors that other libraries split in another way; None: no conversion.
      resized: functions that resize tensors that depend on the image size, by name.

    Example:
      >>> KeyMap((Rename(r"classifier\.(\w+)", "fc.{0}"),)).rename("classifier.weight")
      'fc.weight'
    """

    renames: tuple[Rename, ...] = ()
    ignored: tuple[str, ...] = ()
    convert: Convert | None = None
    resized: Mapping[str, Resize] = field(default_factory=dict, hash=False)

    def rename(self, name: str) -> str:
        """Returns the network's name for a tensor of a file."""
        return self.find(name)[0]

    def find(self, name: str) -> tuple[str, int | None, int]:
        """Returns the network's name, the number of the part, and the number of parts."""
        for rule in self.renames:
            if match := re.fullmatch(rule.pattern, name):
                groups = match.groups()
                digits = {i: group for i, group in enumerate(groups) if group and group.isdecimal()}
                after = {f"after{i}": int(group) + 1 for i, group in digits.items()}
                target = rule.name.format(*groups, **after)
                part = rule.parts.index(match["part"]) if rule.parts else None
                return target, part, len(rule.parts)
        return name, None, 0

    def ignores(self, name: str) -> bool:
        """Returns whether the network does not use a tensor of a file."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)
