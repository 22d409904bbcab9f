"""Callbacks and the checkpoint writer that any LightningModule can use."""

from alignment_modules.callbacks.averaging import PolicyAverage
from alignment_modules.callbacks.bar import StepBar
from alignment_modules.callbacks.checkpoints import Checkpoints
from alignment_modules.callbacks.compare_runs import CompareRuns
from alignment_modules.callbacks.completion_writer import CompletionWriter
from alignment_modules.callbacks.exact_resume import ExactResume
from alignment_modules.callbacks.export import ExportPolicy
from alignment_modules.callbacks.finite_guard import FiniteGuard
from alignment_modules.callbacks.histograms import Histograms
from alignment_modules.callbacks.learning_watch import LearningWatch
from alignment_modules.callbacks.run_report import RunReport
from alignment_modules.callbacks.sample_table import SampleTable
from alignment_modules.callbacks.stop_and_save import StopAndSave
from alignment_modules.callbacks.tensorboard import TensorBoard
from alignment_modules.callbacks.throughput import Throughput
from alignment_modules.training.checkpoint_files import CheckpointError
from alignment_modules.training.checkpoint_io import AtomicCheckpointIO

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "Checkpoints",
    "CompareRuns",
    "CompletionWriter",
    "ExactResume",
    "ExportPolicy",
    "FiniteGuard",
    "Histograms",
    "LearningWatch",
    "PolicyAverage",
    "RunReport",
    "SampleTable",
    "StepBar",
    "StopAndSave",
    "TensorBoard",
    "Throughput",
]
