"""Paths in the console's output."""

import io
import os
import sys

from jaxft.report.console import Console


def test_console_prints_paths_that_are_not_utf8(monkeypatch):
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, "utf-8", write_through=True))
    Console().say(f"folder:{os.fsdecode(b'caf' + bytes([0xE9]))}: 2 images")
    assert stdout.getvalue().decode() == "folder:caf\\xe9: 2 images\n"
