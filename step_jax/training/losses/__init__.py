"""Losses as sums over a batch; see ``training.step.LossOutput``."""
