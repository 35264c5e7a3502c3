"""Evaluation and prediction: outputs, metrics, the best model."""
