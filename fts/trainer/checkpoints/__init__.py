"""Checkpoints of the Trainer: saving, finding, resuming, retention."""
