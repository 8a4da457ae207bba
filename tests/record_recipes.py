"""Records PyTorch trainings of the recipes of configs/, for tests/parity/test_recipes.py.

    python tests/record_recipes.py

Needs torch; recorded with torch 2.13.0, in float64.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "parity")]

from torch_recipes import record  # noqa: E402
from trajectories import CASES, GOLDEN  # noqa: E402

if __name__ == "__main__":
    arrays = {f"{case}/{name}": x for case in CASES for name, x in record(case).items()}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{len(CASES)} cases, {GOLDEN.stat().st_size >> 10} KiB")
