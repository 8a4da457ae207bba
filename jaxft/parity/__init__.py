"""Proof that a PyTorch recipe trains the same here: both run, step by step, and are compared.

The only part of jaxft that needs torch: `pip install 'jaxft[torch]'`.
"""

from typing import TYPE_CHECKING, Any

from jaxft.parity.report import Difference, Report

if TYPE_CHECKING:
    from jaxft.parity.side_by_side import compare
    from jaxft.parity.torch_steps import TorchStage

__all__ = ["Difference", "Report", "TorchStage", "compare"]


def __getattr__(name: str) -> Any:
    # Our own steps, and what compares them, serve without torch too.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxft.parity import side_by_side

    return getattr(side_by_side, name)
