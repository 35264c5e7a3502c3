"""Data of the Trainer: loaders, samplers, columns, the collator, validation."""
