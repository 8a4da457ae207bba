"""Imported first, keeps torch out of a process: tensorboardX would import it where there is one.

That takes a second or two, as long as all else that such a process does.
"""

import sys
from importlib.abc import MetaPathFinder


class NoTorch(MetaPathFinder):
    """Finds no torch, whoever asks."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("no torch here", name=name)


sys.meta_path.insert(0, NoTorch())
