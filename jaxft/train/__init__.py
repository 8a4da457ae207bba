"""Training: a run, its stages, a step, an evaluation."""
