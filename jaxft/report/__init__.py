"""Terminal output and records of a run."""
