"""Checkpoints: numbered folders of arrays, atomic files, and checksums of both."""
