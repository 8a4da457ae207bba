"""Where weights lie: a file of the user's, or one that comes with the package."""

from importlib.resources import files
from pathlib import Path

from jaxft.errors import WeightsError


def locate(weights: str) -> Path:
    """The file of `PATH` or `asset:NAME`.

    Raises:
      WeightsError: no such asset. (Whether a path exists is for the reader to say.)
    """
    if not weights.startswith("asset:"):
        return Path(weights)
    folder = Path(str(files("jaxft") / "assets"))
    path = folder / f"{weights.removeprefix('asset:')}.safetensors"
    if not path.is_file():
        known = ", ".join(f"asset:{p.stem}" for p in sorted(folder.glob("*.safetensors")))
        raise WeightsError(f"{weights}: no such asset. There is {known or 'none'}.")
    return path
