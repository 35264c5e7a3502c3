"""The Trainer's strategy, accelerator and DeepSpeed engine."""
