"""Exports a network with its weights as an ONNX model, and checks it with ONNX Runtime."""

from typing import Any

import jax
import numpy as np

from jaxft.data import Preprocessing
from jaxft.errors import ModelError
from jaxft.models.model import Model, Tree
from jaxft.weights.onnx_graph import BATCH, IR_VERSION, OPSET, convert

TOLERANCE = 1e-5
"""Largest difference between the logits of ONNX Runtime and jax, relative to the largest logit."""

_CHECKED_BATCHES = (1, 3)


def check_installed() -> None:
    """Raises ModelError unless the packages of the extra `onnx` can be imported."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"ONNX export needs the extra onnx: pip install 'jaxft[onnx]' ({error})."
        ) from error
    assert onnx


def serialize(
    model: Model,
    params: Tree,
    stats: Tree,
    preprocessing: Preprocessing,
    *,
    pixels: str = "uint8",
) -> tuple[bytes, dict[str, Any]]:
    """Exports the network in evaluation mode, with its weights.

    The model maps `images` `[batch h w 3]`, for any batch size, to `logits` `[batch k]` in float32,
    as `model.jaxexport` does. Norm layers use running statistics.

    Args:
      model: Network, which computes in float32.
      params: Its parameters.
      stats: Its running statistics.
      preprocessing: Image size, mean and std.
      pixels: `"uint8"`: the model takes decoded RGB images, resized and cropped to
        `preprocessing.image_size`, and normalises them. `"float32"`: it takes normalised images.

    Returns:
      The ONNX model, and its description for `model.json`.

    Raises:
      ModelError: onnx or onnxruntime is not installed, the network uses an operation that the
        converter does not support, or ONNX Runtime computes other logits than jax.
    """
    check_installed()
    import onnxruntime

    size, dtype = preprocessing.image_size, np.dtype(pixels)

    def evaluate(images: jax.Array) -> jax.Array:
        return model.apply(params, stats, preprocessing.normalize(images), norms="running")[0]

    # By default TPUs and GPUs round the operands of float32 products.
    with jax.default_matmul_precision("highest"):
        images = jax.ShapeDtypeStruct((BATCH, size, size, 3), dtype)
        content = convert(evaluate, images, model.name)
        batches = [_draw_images(count, size, dtype) for count in _CHECKED_BATCHES]
        expected = [np.asarray(jax.jit(evaluate)(batch)) for batch in batches]
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        logits = [session.run(["logits"], {"images": batch})[0] for batch in batches]
    except Exception as error:  # its errors have no base class
        raise ModelError(
            f"{model.name} cannot be exported to ONNX: ONNX Runtime cannot run it "
            f"({' '.join(str(error).split())})."
        ) from error
    largest = max(np.abs(each).max() for each in expected) or 1.0
    pairs = zip(logits, expected, strict=True)
    difference = max(np.abs(x - y).max() for x, y in pairs) / largest
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{model.name} cannot be exported to ONNX: ONNX Runtime's logits differ from jax's by "
            f"{difference:.1e} of the largest logit, and {TOLERANCE} is allowed. A network that "
            "computes across the images of a batch cannot be exported."
        )
    return content, {
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "images": f"{dtype} [batch {size} {size} 3]",
        "normalizes": dtype == np.uint8,
        "logits": f"float32 [batch {model.num_classes}]",
        "max_difference": float(difference),
    }


def _draw_images(count: int, size: int, dtype: np.dtype) -> np.ndarray:
    rng, shape = np.random.default_rng(count), (count, size, size, 3)
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)
