"""Optimizers, schedules and gradient transformations of a stage; imports neither Flax nor Orbax."""
