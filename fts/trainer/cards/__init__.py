"""Model cards: README.md with the results, hyperparameters and metadata of a run's model.

Uses `arguments` and `callbacks` of the trainer.
"""

from fts.trainer.cards.card import write_card
from fts.trainer.cards.fields import CardFields
from fts.trainer.cards.training_summary import SummarizedTrainer, TrainingSummary

__all__ = ["CardFields", "SummarizedTrainer", "TrainingSummary", "write_card"]
