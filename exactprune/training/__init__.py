"""A small, honest trainer: dense training, fine-tuning with masks kept, L1, rewinding; and readers of small data sets."""

from __future__ import annotations

from exactprune.training.data import DataSet, load_data
from exactprune.training.trainer import Trained, TrainOptions, accuracy, mean_loss, train

__all__ = ["DataSet", "TrainOptions", "Trained", "accuracy", "load_data", "mean_loss", "train"]
