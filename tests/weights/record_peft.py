"""Records PEFT's logits with adapters of jaxft, and a file of PEFT's, for test_lora_file.py.

    cd tests/weights
    python -c "from test_lora_file import *; save_ours(Path('ours'))"  # with jaxft
    python record_peft.py ours  # with torch and peft

Recorded with peft 0.21.2, in float64.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from drawn import weight  # noqa: E402
from torch_network import ResNet  # noqa: E402

IMAGES = np.random.default_rng(0).standard_normal((2, 33, 33, 3))


def network():
    module = ResNet(bottleneck=True).double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.ndim:  # num_batches_tracked has no dimension
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    return module


@torch.no_grad()
def logits(module):
    return module.eval()(torch.from_numpy(np.moveaxis(IMAGES, -1, 1).copy())).numpy()


def record(folder):
    """Returns the recorded arrays; `folder` holds the adapters of `test_lora_file.save_ours`."""
    arrays = {}
    for name in ("ranks", "alpha"):
        module = PeftModel.from_pretrained(network(), str(folder / name))
        adapted = logits(module)
        merged = logits(module.merge_and_unload())
        np.testing.assert_allclose(adapted, merged, rtol=1e-10)
        arrays[f"{name}/logits"] = adapted
        arrays[f"{name}/config"] = (folder / name / "adapter_config.json").read_text()
    tensors = load_file(folder / "ranks/adapter_model.safetensors")
    arrays["names"] = [*tensors]
    arrays["norms"] = [np.linalg.norm(x) for x in tensors.values()]

    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["layer3.0.conv2", "fc"],
        rank_pattern={"layer3.0.conv2": 4}, init_lora_weights=False,
    )  # fmt: skip
    module = get_peft_model(network(), config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    arrays["peft/logits"] = logits(module)
    with tempfile.TemporaryDirectory() as saved:
        module.save_pretrained(saved)
        arrays["peft/config"] = (Path(saved) / "adapter_config.json").read_text()
        for name, x in load_file(Path(saved) / "adapter_model.safetensors").items():
            arrays[f"peft/tensor/{name}"] = x
    return arrays


if __name__ == "__main__":
    np.savez_compressed(TESTS / "golden" / "peft.npz", **record(Path(sys.argv[1])))
