"""Compares a staged PyTorch training with the same jaxft recipe, step by step.

Only `compare` and `TorchStage` need torch: `pip install 'jaxft[torch]'`.
"""

from typing import TYPE_CHECKING, Any

from jaxft.parity.report import Difference, Report

if TYPE_CHECKING:
    from jaxft.parity.comparison import compare
    from jaxft.parity.torch_steps import TorchStage

__all__ = ["Difference", "Report", "TorchStage", "compare"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the other modules of this package work without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxft.parity import comparison

    return getattr(comparison, name)
