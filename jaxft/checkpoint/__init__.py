"""Checkpoints of a run, weights as an Orbax checkpoint, atomic file writes and checksums."""
