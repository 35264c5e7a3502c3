"""One training run: plan, step, loop."""
