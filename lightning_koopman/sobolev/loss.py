r"""The Sobolev loss as a module with hooks on a network's layers (paper, section 6)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_koopman._checks import is_count
from lightning_koopman.fourier.basis import BasisCache
from lightning_koopman.fourier.domain import (
    Domain,
    Interval,
    check_domain,
    check_finite,
    check_points,
    match_domain,
    observe_domain,
)
from lightning_koopman.sobolev.bands import SobolevNorm
from lightning_koopman.sobolev.functional import (
    check_device,
    check_floating,
    check_grid_arguments,
    check_n_samples,
    check_tensors,
    check_weights,
    grid_loss,
    scattered_loss,
    warn_of_aliases,
    warn_of_modes,
)
from lightning_koopman.sobolev.layer_taps import Tap, layer_names, run_once

MOST_WEIGHTS = 2**28  # in a head: a gigabyte


class SobolevLoss(nn.Module):
    r"""Negative Sobolev norm of the residual, to learn multiscale signals from noisy samples (paper, section 6).

    .. math:: \sum_{\ell=1}^{L} \sum_{m=1}^{M} \sum_{\|k\| \le s(\ell)} (1 + (2\pi\|k\|_2)^2)^s
        \, |\hat r_{\ell m}(k)|^2

    with the transform :math:`\hat r` of the residual; see :func:`sobolev_loss`, which has the same arguments.

    *Sobolev loss 2* (equation 8) uses the network's output alone.  *Sobolev loss 1* (equation 7) adds outputs
    :math:`f_\ell = C_\ell z_\ell` of hidden layers, each trained on the modes up to its own scale.  Their matrices (and
    offsets, unless ``literal``) are parameters of this module.  To train them with the network, assign this module to
    an attribute of your ``LightningModule`` and pass ``self.parameters()`` to the optimizer.  The state dict and the
    export of the network do not contain them.

    Args:
        scales: Highest mode of the output, in cycles per period; or one number per layer, non-decreasing, the output's
            last.  With several layers a single number is expanded to geometric scales from 4 on.  See
            :func:`suggest_scales` and :func:`sobolev_scales`.
        exponent: :math:`s` (default: −1/4; with ``literal`` −1/2, as in the paper).
        literal: Use the shells :math:`\|k\| = s(\ell)` of equations 7 and 8 instead of balls.
        norm: 1 as in the paper, or 2: the norm of the mode that is compared with the scale.
        domain: ``(low, high)``, the ends of one period, or one such pair per input; it must contain all points,
            including those for validation and test.  Default: the range of the first training points plus one mean
            spacing, which is then saved in the state dict.  Required for several processes, mini-batches and
            compilation.
        n_samples: Number of samples in the training set, for training by mini-batches or by several processes: the loss
            of a batch is then unbiased for that of the whole set.  In ``eval`` mode it is unbiased for that of
            infinitely many samples, whatever the size of the batch (it may be negative), unless weights are given.
        network: Network whose hidden layers are recorded by forward hooks.  Each call of the loss uses what they
            returned in the last forward pass (changed by an in-place layer that follows, if any).  Copy network and
            loss together; create the loss before compiling the network.
        layers: Names of these layers in ``network.named_modules()``, or shell-style patterns; ``!`` excludes.  Scales
            are assigned in the order in which the layers run.  Channels are expected in dimension 1 of activations.
        example: An input of the network (a tensor, or a tuple of them), run once to find the widths (default:
            ``network.example_input_array``).
        widths: Without ``network``: number of channels of each activation passed to ``forward``.
        n_outputs: With ``widths``: number of outputs M.

    Attributes:
        domain: The period of each input, once known.
        heads: The linear maps :math:`C_\ell`.

    Raises:
        ValueError: If an argument is out of its range, a layer does not exist, or the example fails.

    Example:
        >>> import torch
        >>> from lightning_koopman import SobolevLoss
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(200, 1)
        >>> y = torch.sin(2 * torch.pi * x) + 0.1 * torch.randn(200, 1)
        >>> network = torch.nn.Sequential(
        ...     *(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Tanh()),
        ...     torch.nn.Linear(20, 1),
        ... )
        >>> loss = SobolevLoss(8, domain=(0, 1), network=network, layers=["1", "3"], example=x)
        >>> loss
        SobolevLoss(
          scales=(4, 6, 8), exponent=-0.25, layers=['1', '3']
          (heads): ModuleList(
            (0-1): 2 x Linear(in_features=20, out_features=1, bias=True)
          )
        )
        >>> optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=0.01)
        >>> values = []
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     values.append(loss(network(x), y, x))
        ...     values[-1].backward()
        ...     _ = optimizer.step()
        >>> values[-1] < 0.1 * values[0]
        tensor(True)
    """

    def __init__(
        self,
        scales: float | Sequence[float],
        *,
        exponent: float | None = None,
        literal: bool = False,
        norm: int = 1,
        domain: Domain | None = None,
        n_samples: float | None = None,
        network: nn.Module | None = None,
        layers: str | Sequence[str] | None = None,
        example: Any = None,
        widths: Sequence[int] | None = None,
        n_outputs: int = 1,
    ) -> None:
        super().__init__()
        self.rule = SobolevNorm(cast("tuple[float, ...]", scales), exponent, literal, norm)
        self.domain = None if domain is None else check_domain(domain)
        self.n_samples = check_n_samples(n_samples)
        if n_samples is not None and domain is None:
            raise ValueError(
                "domain=None takes the period from the whole data set, not from mini-batches: pass domain=(low, high)."
            )
        self.heads = nn.ModuleList()
        self._observed = domain is None
        self._taps: list[Tap] = []
        self._hooks: list[RemovableHandle] = []
        self._cache = BasisCache()
        self._warned = False
        if widths is None and n_outputs != 1:
            raise ValueError(f"n_outputs={n_outputs!r} belongs to widths, which is not given: leave it out.")
        if network is not None or layers is not None or example is not None:
            self._listen(network, layers, example, widths)
        elif widths is not None:
            widths, n_outputs = check_widths(widths, n_outputs)
            self.rule.bands(len(widths) + 1, 1)  # to fail early
            self.heads.extend(self._head(width, n_outputs) for width in widths)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``repr``."""
        shown = f"scales={self.rule.per_layer(len(self.heads) + 1)}, exponent={self.rule.index}"
        shown += ", literal=True" if self.rule.literal else ""
        shown += ", norm=2" if self.rule.norm == 2 else ""
        shown += f", n_samples={self.n_samples}" if self.n_samples is not None else ""
        return shown + (f", layers={[tap.name for tap in self._taps]}" if self._taps else "")

    def forward(
        self,
        outputs: Tensor | Sequence[Tensor],
        targets: Tensor,
        points: Tensor | None = None,
        *,
        hidden: Sequence[Tensor] | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            outputs: As for :func:`sobolev_loss`; a list with one tensor per layer only if there are no heads.
            targets: As for :func:`sobolev_loss`.
            points: As for :func:`sobolev_loss`.
            hidden: With ``widths``: the activations of the hidden layers, each (N, C), or (B, C, n_1, …, n_D) on grids.
            weights: As for :func:`sobolev_loss`.

        Raises:
            TypeError: If an input is complex, not floating point, or not a tensor.
            ValueError: If shapes do not match, or a point lies outside the period (not checked in a compiled step).
            RuntimeError: If the network did not run before this call.
        """
        if self.heads:
            if not isinstance(outputs, Tensor):
                raise TypeError(f"outputs must be the network's output, one tensor, got a {type(outputs).__name__}.")
            (output,), targets, points = check_tensors(outputs, targets, points)
            outputs = [*self._auxiliary(hidden, output), output]
        elif hidden is not None:
            raise ValueError("hidden is given, but there are no heads for it: pass widths to SobolevLoss.")
        stack, targets, points = check_tensors(outputs, targets, points)
        n_samples = self.n_samples
        if n_samples is not None and not self.training:  # n_samples counts the training set
            n_samples = math.inf if weights is None else None
        if points is None:
            check_grid_arguments(self.domain, weights, n_samples)
            self._warn(len(stack), targets.dim() - 2, targets.shape[2:])
            return grid_loss(stack, targets, self.rule)
        weights = check_weights(weights, targets, n_samples)
        box = self._period(points)
        self._warn(len(stack), points.shape[1], len(targets) if n_samples is None else n_samples)
        return scattered_loss(stack, targets, points, self.rule, box, weights, n_samples, self._cache)

    def remove_hooks(self) -> None:
        """Remove the hooks from the network, for instance before scripting; the loss cannot be called after that."""
        remove_all(self._hooks)

    def _listen(
        self,
        network: nn.Module | None,
        layers: str | Sequence[str] | None,
        example: Any,
        widths: Sequence[int] | None,
    ) -> None:
        """Register hooks on the network's layers, and create heads of matching width."""
        if network is None or layers is None:
            raise ValueError(
                "network, layers and example belong together: give the network and the names of its layers."
            )
        if widths is not None:
            raise ValueError(f"widths={widths!r} are for activations passed to forward: leave them out with layers.")
        example = getattr(network, "example_input_array", None) if example is None else example
        if example is None:
            raise ValueError("example=None: pass an input of the network, which determines the widths of its layers.")
        network = getattr(network, "_orig_mod", network)  # the module that torch.compile has wrapped
        names = layer_names(network, layers)
        self.rule.bands(len(names) + 1, 1)  # to fail early
        output, heard = run_once(network, example, names)
        if not isinstance(output, Tensor):
            raise ValueError(f"the network returns a {type(output).__name__} for the example, not one tensor.")
        for name in names:
            check_layer(name, heard.get(name, []))
        n_outputs = 1 if output.dim() == 1 else output.shape[1]
        for name, (value,) in heard.items():  # in the order in which they run
            self.heads.append(self._head(value.shape[1], n_outputs, dtype=output.dtype, device=output.device))
            self._taps.append(Tap(name))
            self._hooks.append(network.get_submodule(name).register_forward_hook(self._taps[-1]))
        self._own_taps()

    def _head(self, width: int, n_outputs: int, **options: Any) -> nn.Linear:
        """Return the linear map of a layer: as in equation 7, plus an offset unless ``literal``."""
        return nn.Linear(width, n_outputs, bias=not self.rule.literal, **options)

    def _own_taps(self) -> None:
        """Let the taps record as long as this module exists."""
        for tap in self._taps:
            tap.belong_to(self)
        weakref.finalize(self, remove_all, self._hooks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._own_taps()

    def _auxiliary(self, hidden: Sequence[Tensor] | Tensor | None, outputs: Tensor) -> list[Tensor]:
        """Return outputs of the hidden layers: linear maps of their channels."""
        if self._taps:
            if hidden is not None:
                raise ValueError("hidden is given, but the layers are recorded by hooks: leave it out.")
            most = max(tap.calls for tap in self._taps)
            if most > 1:
                warnings.warn(
                    f"layers: the network ran {most} times since the loss was last called, which uses only the last "
                    "run: call the loss after each forward pass, or run the others under torch.no_grad().",
                    stacklevel=2,
                )
            frozen = [tap.name for tap in self._taps if not tap.with_grad]
            if frozen and outputs.requires_grad:
                warnings.warn(
                    f"layers: {', '.join(frozen)} ran under no_grad, so the "
                    "loss does not train earlier layers: checkpoint with use_reentrant=False, or name other layers.",
                    stacklevel=2,
                )
            hidden = [tap.take() for tap in self._taps]
        elif hidden is None:
            raise ValueError(f"hidden=None: pass {len(self.heads)} activations, one for each of widths.")
        if not isinstance(hidden, (list, tuple, Tensor)):
            raise TypeError(f"hidden must be a list of tensors, one for each of widths, got {type(hidden).__name__}.")
        if len(hidden) != len(self.heads) or not all(isinstance(each, Tensor) for each in hidden):
            raise ValueError(
                f"hidden must be {len(self.heads)} tensors, one for each of widths, got {len(hidden)}: "
                f"{', '.join(type(each).__name__ for each in hidden[:3])}."
            )
        found = []
        for index, (head, values) in enumerate(zip(self.heads, hidden, strict=True)):
            expected = (len(outputs), cast("nn.Linear", head).in_features, *outputs.shape[2:])
            name = f"layer {self._taps[index].name!r}" if self._taps else f"hidden[{index}]"
            check_floating(name, values)
            check_device(name, values, "outputs", outputs)
            if tuple(values.shape) != expected:
                raise ValueError(
                    f"{name} has the shape {tuple(values.shape)}, expected {expected}: the samples of `outputs`, and "
                    "in dimension 1 the channels that it had when the loss was created."
                )
            found.append(head(in_dtype_of(head, values).movedim(1, -1)).movedim(-1, 1))
        return found

    def _period(self, points: Tensor) -> tuple[Interval, ...]:
        """Return one period for each input."""
        if self.domain is not None:
            box = match_domain(self.domain, points.shape[1])
            if self.training or not self._observed:
                check_points(points, box)
            else:  # held-out points may lie outside the observed period
                check_finite(points)
            return box
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.training and several and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "domain=None: each process would see the range of its own samples; pass domain=(low, high)."
            )
        box = observe_domain(points)
        if self.training:
            self.domain = box
        return box

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._observed and self.domain is not None:
            destination[prefix + "domain"] = torch.tensor(self.domain, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        stored = state_dict.pop(prefix + "domain", None)
        if self._observed and stored is not None:
            self.domain = check_domain(stored)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _warn(self, n_layers: int, dim: int, extent: float | Sequence[int]) -> None:
        """Warn once of too many modes for the samples or the grid."""
        if self._warned or not self.training or torch.compiler.is_compiling():
            return
        self._warned = True
        bands = self.rule.bands(n_layers, dim)
        if isinstance(extent, Sequence):
            warn_of_aliases(bands, extent)
        else:
            warn_of_modes(bands, extent)


def remove_all(hooks: list[RemovableHandle]) -> None:
    """Remove the hooks and empty the list."""
    while hooks:
        hooks.pop().remove()


def check_layer(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError unless the layer returned exactly one tensor with channels for the example."""
    if len(values) != 1:
        raise ValueError(f"layer {name!r} runs {len(values)} times for the example: name layers that run once.")
    if not isinstance(values[0], Tensor):
        raise ValueError(f"layer {name!r} returns a {type(values[0]).__name__}: name layers that return a tensor.")
    if values[0].dim() < 2:
        raise ValueError(f"layer {name!r} returns the shape {tuple(values[0].shape)}: channels must be in dimension 1.")


def in_dtype_of(head: nn.Module, values: Tensor) -> Tensor:
    """Return activations in the dtype of their head, unless autocast converts both."""
    automatic = torch.is_autocast_enabled(values.device.type) and values.dtype.itemsize <= 4
    return values if automatic else values.to(cast("nn.Linear", head).weight.dtype)


def check_widths(widths: object, n_outputs: object) -> tuple[list[int], int]:
    """Return widths as a list, and the number of outputs; raise ValueError unless they are whole numbers ≥ 1."""
    several = isinstance(widths, (Sequence, np.ndarray)) and not isinstance(widths, (str, bytes)) and np.ndim(widths)
    numbers = list(cast("Sequence[int]", widths)) if several else []
    if not numbers or not all(is_count(number) for number in (*numbers, n_outputs)):
        raise ValueError(f"widths and n_outputs must be whole numbers ≥ 1, got {widths!r} and {n_outputs!r}.")
    most = max(map(int, numbers)) * int(cast("int", n_outputs))
    if most > MOST_WEIGHTS:
        raise ValueError(f"widths and n_outputs give a head of {most:,} weights, above {MOST_WEIGHTS:,}: lower one.")
    return [int(number) for number in numbers], int(cast("int", n_outputs))
