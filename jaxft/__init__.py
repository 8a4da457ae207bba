"""Staged fine-tuning for JAX: which layers train, at which rate, in each stage."""
