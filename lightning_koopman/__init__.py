"""Treat training as a dynamical system: the Koopman spectrum of a network's weights, for PyTorch Lightning."""

from lightning_koopman.averaging.average import AveragedWeights, averaged_weights
from lightning_koopman.callbacks.autopilot import koopman_autopilot
from lightning_koopman.callbacks.averaging import KoopmanWeightAveraging
from lightning_koopman.callbacks.early_stopping import EarlyStopOnUnitEigenvalues
from lightning_koopman.callbacks.guard import KoopmanWarning
from lightning_koopman.callbacks.monitor import KoopmanSpectrumMonitor
from lightning_koopman.callbacks.pruning import KoopmanPruner
from lightning_koopman.callbacks.reduce_lr import ReduceLROnNoiseFloor
from lightning_koopman.callbacks.restart import RestartOnBadInitialization
from lightning_koopman.compare.comparison import TrainingComparison, compare_trainings
from lightning_koopman.compare.figure import plot_comparison
from lightning_koopman.depth.estimate import DepthEstimate, estimate_depth
from lightning_koopman.depth.hsvr import HSVR
from lightning_koopman.depth.mlp import MLPSuggestion, suggest_mlp
from lightning_koopman.dmd.random_walk import random_walk_spectrum
from lightning_koopman.dmd.rrr import dmd_rrr
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.parameters.select import select_parameters
from lightning_koopman.plots.depth import plot_depth
from lightning_koopman.plots.spectrum import plot_spectrum, plot_steps
from lightning_koopman.plots.training import plot_history, plot_portrait
from lightning_koopman.pruning.channel_removal import ChannelRemoval, resize_like
from lightning_koopman.pruning.channels import remove_channels
from lightning_koopman.pruning.export import export_network
from lightning_koopman.pruning.masks import MaskSet
from lightning_koopman.pruning.prunable import prunable_parameters
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.reading import TrainingReading, read_training
from lightning_koopman.sobolev.bands import sobolev_scales
from lightning_koopman.sobolev.functional import sobolev_loss
from lightning_koopman.sobolev.loss import SobolevLoss
from lightning_koopman.sobolev.noise import shrink_noise, suggest_scales
from lightning_koopman.stopping.rule import StoppingReason
from lightning_koopman.trajectory.trajectory import Trajectory

__version__ = "0.2.0"
__all__ = [
    "HSVR",
    "AveragedWeights",
    "ChannelRemoval",
    "DepthEstimate",
    "EarlyStopOnUnitEigenvalues",
    "KoopmanPruner",
    "KoopmanSpectrumMonitor",
    "KoopmanWarning",
    "KoopmanWeightAveraging",
    "MLPSuggestion",
    "MaskSet",
    "Phase",
    "ReduceLROnNoiseFloor",
    "RestartOnBadInitialization",
    "SobolevLoss",
    "Spectrum",
    "StoppingReason",
    "TrainingComparison",
    "TrainingReading",
    "Trajectory",
    "averaged_weights",
    "compare_trainings",
    "dmd_rrr",
    "estimate_depth",
    "export_network",
    "koopman_autopilot",
    "plot_comparison",
    "plot_depth",
    "plot_history",
    "plot_portrait",
    "plot_spectrum",
    "plot_steps",
    "prunable_parameters",
    "random_walk_spectrum",
    "read_training",
    "remove_channels",
    "resize_like",
    "select_parameters",
    "shrink_noise",
    "sobolev_loss",
    "sobolev_scales",
    "suggest_mlp",
    "suggest_scales",
]
