"""Tier 9: training on packed batches."""

from omnimoe.train.checkpoint import ResumeError, load_settings, save_checkpoint
from omnimoe.train.data import DataMismatchError, held_out_batches, training_batches
from omnimoe.train.evaluate import evaluate
from omnimoe.train.loop import History, Training, TrainingError
from omnimoe.train.optim import learning_rate, make_optimizer
from omnimoe.train.settings import TrainSettings

__all__ = [
    "DataMismatchError",
    "History",
    "ResumeError",
    "TrainSettings",
    "Training",
    "TrainingError",
    "evaluate",
    "held_out_batches",
    "learning_rate",
    "make_optimizer",
    "save_checkpoint",
    "load_settings",
    "training_batches",
]
