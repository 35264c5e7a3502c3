"""Model cards: README.md with what a run knows of its model."""
