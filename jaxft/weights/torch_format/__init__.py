"""Reader for the files that `torch.save` writes, without torch."""
