"""What the console prints of paths."""

import io
import os
import sys

from jaxft.report.console import Console


def test_console_prints_paths_that_are_not_utf8(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", write_through=True))
    Console().say(f"folder:{os.fsdecode(b'caf' + bytes([0xE9]))}: 2 images")
    assert printed.getvalue().decode() == "folder:caf\\xe9: 2 images\n"
