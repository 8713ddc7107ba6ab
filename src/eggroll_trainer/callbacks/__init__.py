"""Callbacks, which observe a run: ``trainer.train(100, callback=[…])``."""

from ..checkpoints.folder import Checkpoints
from ..checkpoints.score_log import ScoreLog
from .callback import Callback, Callbacks
from .diagnosis import Diagnosis
from .mlflow_tracking import MLflow
from .progress import Progress
from .records import CSV, JSONLines
from .stopping import EarlyStopping, TimeLimit
from .tensorboard import TensorBoard
from .weight_average import WeightAverage
from .weights_and_biases import WeightsAndBiases

__all__ = [
    "CSV",
    "Callback",
    "Callbacks",
    "Checkpoints",
    "Diagnosis",
    "EarlyStopping",
    "JSONLines",
    "MLflow",
    "Progress",
    "ScoreLog",
    "TensorBoard",
    "TimeLimit",
    "WeightAverage",
    "WeightsAndBiases",
]
