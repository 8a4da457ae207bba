"""LoRA adapters in the files of PEFT: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from jaxft.checkpoint import atomic
from jaxft.errors import WeightsError, first_of
from jaxft.labels import Tree
from jaxft.lora_adapters import LORA_A, LORA_B, TORCH_AXES, Adapters
from jaxft.tree_paths import leaves_of
from jaxft.weights.key_maps import torch_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options of PEFT that change the outputs, and their values in the adapters of jaxft.
_PLAIN = {
    "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none",
    "lora_bias": False,
}  # fmt: skip


class LoadedLora(NamedTuple):
    """Adapters of a file, and the `alpha` with which `jaxft.merge_lora` merges them."""

    adapters: Adapters
    alpha: float | None


def save_lora(
    folder: str | PathLike[str],
    adapters: Adapters,
    *,
    alpha: float | None = None,
    trained: Mapping[str, Tree] | None = None,
) -> None:
    """Saves adapters as PEFT does, for `PeftModel.from_pretrained(torch_network, folder)`.

    The module of a kernel has the same path in torch's network as here: `layer4.0.conv1`. PEFT has
    other shapes for convolutions in groups.

    Args:
      folder: folder of the two files; it is created if it does not exist.
      adapters: the adapters.
      alpha: see `jaxft.merge_lora`.
      trained: modules that trained as a whole, by path, such as `{"fc": params["fc"]}`. The file
        has all of their arrays with torch's names; PEFT replaces the modules by them.

    Raises:
      WeightsError: there are no adapters, or `trained` has an array that has no torch name.
    """
    if not adapters:
        raise WeightsError(f"{folder}: there are no adapters to save.")
    modules = {_module(path): adapter for path, adapter in adapters.items()}
    tensors = {}
    for module, adapter in modules.items():
        a, b = (np.asarray(jax.device_get(adapter[name])) for name in (LORA_A, LORA_B))
        b = b.T if a.ndim == 2 else b.T[..., None, None]
        a = np.transpose(a, TORCH_AXES[a.ndim])
        for name, array in (("lora_A", a), ("lora_B", b)):
            tensors[f"{_PREFIX}{module}.{name}.weight"] = np.ascontiguousarray(array)
    for module, tree in (trained or {}).items():
        names = jax.tree.leaves(torch_tensors(tree, {})[0])
        arrays = zip(names, jax.device_get(jax.tree.leaves(tree)), strict=True)
        tensors |= {f"{_PREFIX}{module}.{t.name}": t.to_torch(x) for t, x in arrays}
    folder = atomic.anywhere(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / TENSORS, safetensors.save(tensors, {"format": "pt"}))
    ranks = {module: len(adapter[LORA_B]) for module, adapter in modules.items()}
    atomic.write(folder / CONFIG, json.dumps(_config(ranks, alpha, trained), indent=2) + "\n")


def load_lora(folder: str | PathLike[str], params: Tree) -> LoadedLora:
    """Loads adapters that PEFT or `save_lora` has saved.

    Other modules in the file, PEFT's `modules_to_save`, are not loaded.

    Args:
      folder: folder of the two files.
      params: parameters of the network, in which each module of the file has one kernel.

    Returns:
      `(adapters, alpha)`, for `jaxft.merge_lora(params, adapters, alpha=alpha)`.

    Raises:
      WeightsError: there is no such file, its adapters are of another kind than LoRA's of dense and
        convolution layers, or a module of theirs has no kernel in `params`.
    """
    folder = atomic.anywhere(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = safetensors.load((folder / TENSORS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no readable adapters of PEFT: {error}") from error
    _check_plain(config, str(folder))
    kernels: dict[str, list[str]] = {}
    for leaf in leaves_of(params):
        if len(np.shape(leaf.value)) in TORCH_AXES:
            kernels.setdefault(_module(leaf.path), []).append(leaf.path)
    adapters: Adapters = {}
    alphas: dict[str, float] = {}
    for module, pair in _pairs(tensors, str(folder)).items():
        if len(found := kernels.get(module, [])) != 1:
            raise WeightsError(
                f"{folder} has an adapter of {module!r}, where params have {len(found)} kernels; "
                f"they have kernels at {', '.join(first_of(kernels, 8))}."
            )
        a, b = pair["lora_A"], pair["lora_B"]
        if a.ndim not in TORCH_AXES:
            raise WeightsError(
                f"{folder}: the adapter of {module!r} has {a.ndim} axes, and is neither a dense "
                "layer's nor a two-dimensional convolution's."
            )
        a = np.transpose(a, np.argsort(TORCH_AXES[a.ndim]))
        adapters[found[0]] = {LORA_A: jnp.asarray(a), LORA_B: jnp.asarray(b.reshape(len(b), -1).T)}
        alphas[found[0]] = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    if all(alpha == len(adapters[path][LORA_B]) for path, alpha in alphas.items()):
        return LoadedLora(adapters, None)
    if len({*alphas.values()}) > 1:
        raise WeightsError(f"{folder} has several values of alpha: {config['alpha_pattern']}.")
    return LoadedLora(adapters, next(iter(alphas.values())))


def _config(
    ranks: Mapping[str, int], alpha: float | None, trained: Mapping[str, Tree] | None
) -> dict[str, Any]:
    """Returns PEFT's configuration; its patterns are regular expressions for whole paths."""
    rank = max(ranks.values())
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        # A list would also select all modules whose paths end with one of its entries.
        "target_modules": "|".join(map(re.escape, ranks)),
        "rank_pattern": others,
        "alpha_pattern": others if alpha is None else {},
        "modules_to_save": None if trained is None else list(trained),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
        **_PLAIN,
    }


def _check_plain(config: Mapping[str, Any], source: str) -> None:
    """Raises WeightsError for adapters that `merge_lora` would merge wrongly."""
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{source} has adapters of type {config.get('peft_type')}, not LORA.")
    if missing := {"lora_alpha"} - config.keys():
        raise WeightsError(f"{source} states no {', '.join(missing)} in {CONFIG}.")
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            raise WeightsError(f"{source} has {name}={config[name]!r}, and must have {value!r}.")


def _pairs(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors `lora_A` and `lora_B` of each module with an adapter.

    Raises:
      WeightsError: there are none, one is missing, or there are tensors of other adapters.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in (name for name in tensors if "lora_" in name):
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name.removeprefix(_PREFIX))
        if not match:
            raise WeightsError(f"{source} has {name}, which is no dense or convolution adapter's.")
        pairs.setdefault(match[1], {})[match[2]] = tensors[name]
    if not pairs or any(len(pair) < 2 for pair in pairs.values()):
        missing = [module for module, pair in pairs.items() if len(pair) < 2]
        names = ", ".join(missing) or "any module"
        raise WeightsError(f"{source} lacks lora_A or lora_B of {names}.")
    return pairs


def _module(path: str) -> str:
    """Returns the path of the module of a kernel."""
    return path.rpartition(".")[0] or path


def _of_module(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """Returns the value of a module, by PEFT's rule: a key matches the end of a path."""
    matching = (x for key, x in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)
