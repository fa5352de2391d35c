"""Attacks: one file each, all on the training loop of `benchmarks.training`."""
