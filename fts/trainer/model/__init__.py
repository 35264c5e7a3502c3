"""The model of a run: preparation, weights, loss."""
