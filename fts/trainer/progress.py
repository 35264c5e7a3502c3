"""Progress bars; they live in `fts.trainer.callbacks`."""

from fts.trainer.callbacks.progress import ProgressCallback

__all__ = ["ProgressCallback"]
