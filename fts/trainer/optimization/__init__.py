"""Optimizers and schedules by their transformers names."""
