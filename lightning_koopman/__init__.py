"""Treat training as a dynamical system: the Koopman spectrum of a network's weights, for PyTorch Lightning."""

from lightning_koopman.callbacks._base import KoopmanWarning
from lightning_koopman.callbacks.early_stopping import EarlyStopOnUnitEigenvalues
from lightning_koopman.callbacks.initialization import RestartOnBadInitialization
from lightning_koopman.callbacks.monitor import KoopmanSpectrumMonitor
from lightning_koopman.callbacks.pruning import KoopmanPruner
from lightning_koopman.channels import remove_channels
from lightning_koopman.convergence import StoppingReason
from lightning_koopman.depth.estimate import DepthEstimate, estimate_depth
from lightning_koopman.depth.hsvr import HSVR
from lightning_koopman.depth.networks import MLPSuggestion, suggest_mlp
from lightning_koopman.dmd import dmd_rrr
from lightning_koopman.export import export_network
from lightning_koopman.losses.functional import sobolev_loss
from lightning_koopman.losses.modes import sobolev_scales
from lightning_koopman.losses.shrinkage import shrink_noise, suggest_scales
from lightning_koopman.losses.sobolev import SobolevLoss
from lightning_koopman.masks import MaskSet, prunable_parameters
from lightning_koopman.parameters import select_parameters
from lightning_koopman.persistence import persistent_weights
from lightning_koopman.plots import plot_depth, plot_history, plot_spectrum
from lightning_koopman.removal import ChannelRemoval, resize_like
from lightning_koopman.spectrum import Spectrum
from lightning_koopman.surrogate import random_walk_spectrum
from lightning_koopman.trajectory import Trajectory

__version__ = "0.1.0"
__all__ = [
    "HSVR",
    "ChannelRemoval",
    "DepthEstimate",
    "EarlyStopOnUnitEigenvalues",
    "KoopmanPruner",
    "KoopmanSpectrumMonitor",
    "KoopmanWarning",
    "MLPSuggestion",
    "MaskSet",
    "RestartOnBadInitialization",
    "SobolevLoss",
    "Spectrum",
    "StoppingReason",
    "Trajectory",
    "dmd_rrr",
    "estimate_depth",
    "export_network",
    "persistent_weights",
    "plot_depth",
    "plot_history",
    "plot_spectrum",
    "prunable_parameters",
    "random_walk_spectrum",
    "remove_channels",
    "resize_like",
    "select_parameters",
    "shrink_noise",
    "sobolev_loss",
    "sobolev_scales",
    "suggest_mlp",
    "suggest_scales",
]
