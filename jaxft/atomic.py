"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write(path: Path, content: bytes | str) -> None:
    """Writes a file, over any older one, so that no reader and no crash ever sees a part of it."""
    # In the same folder, so that the replacement is one step of the file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
