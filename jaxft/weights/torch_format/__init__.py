"""Reads files of `torch.save` without torch."""
