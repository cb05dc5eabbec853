r"""Hierarchical support vector regression (paper, section 5 and Table 1)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.svm import SVR
from sklearn.utils.validation import check_is_fitted, validate_data

from lightning_koopman._checks import check_flag, hold_words, is_count, is_number, real_array
from lightning_koopman.depth.estimate import FEWEST, MOST_INPUTS, DepthEstimate, check_range, check_rule, estimate_depth
from lightning_koopman.depth.frequencies import ROUNDING

Array = npt.NDArray[np.float64]

MOST_LAYERS, LEAST_TOL = 10_000, 1e-15  # for smaller ones the solver may not terminate


class HSVR(RegressorMixin, MultiOutputMixin, BaseEstimator):  # type: ignore[misc]
    r"""Hierarchical support vector regression: a sum of SVR models from coarse to fine (paper, equation 5).

    .. math:: S(x) = \sum_{\ell=1}^{L} a_\ell(x; \gamma_\ell), \qquad
        \gamma_\ell = 1 / \sigma_\ell^2, \quad \sigma_\ell = 1 / (6 f_\ell)

    Each layer fits the residual of the layers before it.  Their number and scales are estimated from the spectrum of
    the samples (:func:`estimate_depth`), without a search.

    Args:
        n_layers: Number of layers, ≥ 1 (default: estimated).  If it is less than estimated, the coarsest are kept; if
            it is more, each further scale is finer by a factor of ``decay``.
        scales: Standard deviations σ > 0 of the layers' Gaussians, coarsest first, in the unit of X (default:
            estimated).
        method: ``"fft"`` (least squares for scattered samples) or ``"dmd"``, see :func:`estimate_depth`.
        decay: Least ratio > 1 between the scales of two successive layers.
        threshold: Share of the largest size above which a frequency counts (default: 0.01, for ``"dmd"`` 0.3).
        taper: Whether to fade the samples out at both ends before computing their spectrum; often fewer layers suffice.
        epsilon: Half width of the tube without loss, ≥ 0, relative to the range of y: the target accuracy.
        C: Penalty, > 0, relative to the range of the residual that a layer fits.
        samples_per_scale: All layers but the last are fitted to means over cells of side σ / ``samples_per_scale``.
            For coarse layers these are far fewer than the samples, and the error stays nearly the same.  None: all
            layers are fitted to all samples, as in the paper.
        tol: Tolerance of the solver, > 0, relative to the range of y.
        cache_size: Kernel cache of the solver in MB, > 0.
        verbose: 1: print one line per layer, and the notes of the estimate.

    Attributes:
        n_layers_: Number of layers L.
        scales_: Array (L,), decreasing: σ of each layer.
        depth_: The estimate, or None if the scales were given or could not be estimated.
        estimators_: L lists of M fitted ``sklearn.svm.SVR``.
        layer_errors_: Array (L,): largest absolute error on the training samples after each layer.
        n_features_in_: Number of inputs D.
        offset_: Array (D,): mean of the points, subtracted before fitting.
        means_: Array (M,): means of the outputs, subtracted before fitting.
        ranges_: Array (M,): ranges that the outputs are divided by before fitting; 1 for a constant output.

    Scales cannot be estimated with more than three inputs, fewer than eight distinct points or a constant y.  Unless
    ``scales`` are given, the first layer then has scikit-learn's ``gamma="scale"``, and ``n_layers`` defaults to 1 (for
    more than three inputs with a warning).  Repeated points enter the estimate with the mean of their samples.  One
    scale serves all inputs: bring them to similar ranges (``StandardScaler``).  Noise above the threshold adds layers
    as signal does, down to the spacing of the samples: raise ``threshold`` and ``epsilon`` above it.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import HSVR
        >>> x = np.linspace(0, 2, 1001)[:, None]
        >>> y = np.cos(2 * np.pi * x[:, 0]) + np.sin(20 * np.pi * x[:, 0])
        >>> model = HSVR().fit(x, y)
        >>> model.n_layers_, bool(np.abs(model.predict(x) - y).max() < 0.011 * np.ptp(y))
        (2, True)
    """

    def __init__(
        self,
        n_layers: int | None = None,
        *,
        scales: Sequence[float] | None = None,
        method: str = "fft",
        decay: float = 2.0,
        threshold: float | None = None,
        taper: bool = False,
        epsilon: float = 0.01,
        C: float = 5.0,  # noqa: N803
        samples_per_scale: float | None = 30.0,
        tol: float = 1e-4,
        cache_size: float = 500.0,
        verbose: int = 0,
    ) -> None:
        self.n_layers = n_layers
        self.scales = scales
        self.method = method
        self.decay = decay
        self.threshold = threshold
        self.taper = taper
        self.epsilon = epsilon
        self.C = C
        self.samples_per_scale = samples_per_scale
        self.tol = tol
        self.cache_size = cache_size
        self.verbose = verbose

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> HSVR:  # noqa: N803
        """Fit the layers from coarse to fine.

        Args:
            X: Points (N, D), in any order.
            y: Samples (N,) or (N, M).

        Returns:
            self.

        Raises:
            ValueError: If an argument is out of its range, the samples are not finite or do not match, or
                ``method="dmd"`` does not suit them.
        """
        X, y = _detached("X", X), _detached("y", y)  # noqa: N806
        given = _validated(self, X, y, multi_output=True, y_numeric=True)
        inputs, targets = (np.asarray(each, dtype=np.float64) for each in given)
        self._check_parameters()
        self._single = targets.ndim == 1
        targets = targets.reshape(len(inputs), -1)
        with np.errstate(over="ignore", divide="ignore"):
            self.scales_ = self._find_scales(inputs, targets)
            gammas = 1 / self.scales_**2
        if not np.isfinite(gammas).all():
            origin = f"decay={self.decay!r}, n_layers={self.n_layers!r}" if self.scales is None else "scales"
            raise ValueError(
                f"{origin} give a scale of {self.scales_[-1]:g}, too small to compute with: use fewer layers."
            )
        self.n_layers_ = len(self.scales_)
        if self.verbose and self.depth_ is not None:
            for note in self.depth_.notes:
                print(f"[HSVR] note: {note}")
        # normalize: the solver loses precision far from the origin, and its tolerance is absolute
        self.offset_ = inputs.mean(axis=0)
        self.means_ = targets.mean(axis=0)
        ranges = np.ptp(targets, axis=0)
        self.ranges_ = np.where(ranges > ROUNDING * np.abs(targets).max(axis=0), ranges, 1.0)
        inputs = inputs - self.offset_
        left = (targets - self.means_) / self.ranges_
        self.estimators_: list[list[SVR]] = []
        errors = []
        for layer, scale in enumerate(self.scales_):
            started = time.perf_counter()
            last = layer == self.n_layers_ - 1
            points, values = (
                (inputs, left) if last or self.samples_per_scale is None else self._thin(inputs, left, scale)
            )
            models = [
                SVR(
                    gamma=gammas[layer],
                    C=float(self.C) * np.ptp(left[:, output]) or 1.0,
                    epsilon=float(self.epsilon),
                    tol=float(self.tol),
                    cache_size=float(self.cache_size),
                ).fit(points, values[:, output])
                for output in range(left.shape[1])
            ]
            self.estimators_.append(models)
            left -= _predictions(models, inputs)
            errors.append((np.abs(left) * self.ranges_).max())
            if self.verbose:
                vectors = sum(len(model.support_) for model in models)
                print(
                    f"[HSVR] layer {layer + 1} of {self.n_layers_}: scale {scale:.4g}, {len(points):,} samples, "
                    f"{vectors:,} support vectors, largest error {errors[-1]:.4g}, "
                    f"{time.perf_counter() - started:.1f} s"
                )
        self.layer_errors_ = np.array(errors)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:  # noqa: N803
        """Return the sum of all layers at the points (N, D): (N,) or (N, M), like y."""
        points = self._check_points(X)
        return self._shaped(np.sum([_predictions(models, points) for models in self.estimators_], axis=0))

    def staged_predict(self, X: npt.ArrayLike) -> Iterator[Array]:  # noqa: N803
        """Yield the sum after each layer, in the shape of :meth:`predict`."""
        points = self._check_points(X)
        total: Array = np.zeros((len(points), len(self.estimators_[0])))
        for models in self.estimators_:
            total = total + _predictions(models, points)
            yield self._shaped(total)

    def _check_points(self, X: npt.ArrayLike) -> Array:  # noqa: N803
        check_is_fitted(self)
        X = _detached("X", X)  # noqa: N806
        points: Array = _validated(self, X, reset=False) - self.offset_
        return points

    def _shaped(self, values: Array) -> Array:
        given: Array = self.means_ + self.ranges_ * values
        return given[:, 0] if self._single else given

    def _find_scales(self, inputs: Array, targets: Array) -> Array:
        """Return σ of each layer."""
        self.depth_: DepthEstimate | None = None
        if self.scales is not None:
            return np.atleast_1d(real_array("scales", self.scales).astype(np.float64))
        varying = inputs[:, np.ptp(inputs, axis=0) > ROUNDING * np.abs(inputs).max(axis=0)]
        points, index, counts = np.unique(varying, axis=0, return_inverse=True, return_counts=True)
        constant = not np.ptp(targets, axis=0).any()
        if not 0 < varying.shape[1] <= MOST_INPUTS or len(points) < FEWEST or constant:
            if varying.shape[1] > MOST_INPUTS:
                warnings.warn(
                    f"X has {varying.shape[1]} inputs: scales are estimated for {MOST_INPUTS} at most, so the first "
                    "layer uses gamma='scale'. Pass scales.",
                    stacklevel=3,
                )
            first = np.sqrt(inputs.shape[1] * inputs.var()) or 1.0
            return np.asarray(first / self.decay ** np.arange(self.n_layers or 1), dtype=np.float64)
        check_range("X", points)
        samples = _means(targets, index, counts)
        self.depth_ = estimate_depth(
            points, samples, self.method, self.decay, threshold=self.threshold, taper=self.taper
        )
        scales = self.depth_.scales
        if self.n_layers is not None:
            further = scales[-1] / self.decay ** np.arange(1, self.n_layers)
            scales = np.concatenate([scales, further])[: self.n_layers]
        return scales

    def _thin(self, inputs: Array, left: Array, scale: float) -> tuple[Array, Array]:
        """Return means of points and values over cells proportional to the layer's scale."""
        assert self.samples_per_scale is not None
        side = scale / self.samples_per_scale
        cells = np.floor((inputs - inputs.min(axis=0)) / side)
        _, index, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        if len(counts) == len(inputs):
            return inputs, left
        return _means(inputs, index, counts), _means(left, index, counts)

    def _check_parameters(self) -> None:
        """Raise ValueError for an argument out of its range; :func:`estimate_depth` checks ``threshold``."""
        if self.n_layers is not None and not (is_count(self.n_layers) and self.n_layers <= MOST_LAYERS):
            raise ValueError(
                f"n_layers must be a whole number ≥ 1 and ≤ {MOST_LAYERS}, or None, got {self.n_layers!r}."
            )
        if self.scales is not None:
            unfit: Any = self.scales
            if isinstance(unfit, (str, bytes)) or np.ma.isMaskedArray(unfit):
                raise ValueError(f"scales must be a list of numbers > 0, coarsest first, got {self.scales!r}.")
            given = unfit.detach() if hasattr(unfit, "detach") else unfit
            scales = np.atleast_1d(np.asarray(given, dtype=object))
            if scales.ndim > 1 or not scales.size or not all(is_number(scale) and scale > 0 for scale in scales):
                raise ValueError(f"scales must be a list of numbers > 0, coarsest first, got {self.scales!r}.")
            if (np.diff(scales.astype(np.float64)) >= 0).any():
                raise ValueError(f"scales must decrease from layer to layer, got {self.scales!r}: sort them.")
            if self.n_layers not in (None, len(scales)):
                raise ValueError(f"n_layers={self.n_layers!r}, but scales has length {len(scales)}: leave one out.")
        check_rule(self.method, self.decay)
        check_flag("taper", self.taper)
        if not isinstance(self.verbose, (bool, np.bool_)) and not is_count(self.verbose, 0):
            raise ValueError(f"verbose must be a whole number ≥ 0, got {self.verbose!r}.")
        if not (is_number(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon must be a number ≥ 0, relative to the range of y, got {self.epsilon!r}.")
        positive: dict[str, Any] = {"C": self.C, "tol": self.tol, "cache_size": self.cache_size}
        if self.samples_per_scale is not None:
            positive["samples_per_scale"] = self.samples_per_scale
        for name, value in positive.items():
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number > 0, got {value!r}.")
        if self.tol < LEAST_TOL:
            raise ValueError(f"tol must be at least {LEAST_TOL:g}, got {self.tol!r}: the solver would not terminate.")


def _detached(name: str, values: Any) -> Any:
    """Return tensors as arrays; raise ValueError for what is no array of numbers.  scikit-learn checks the rest."""
    if hasattr(values, "detach") or np.ma.isMaskedArray(values):
        return real_array(name, values)
    words = values is not None and hold_words(values)  # scikit-learn would convert them to numbers
    if words or type(values) in (str, bytes, dict, set, bool) or callable(values):
        kind = "strings, records or None in it" if words else type(values).__name__
        raise ValueError(f"{name} must be an array of numbers, got {kind}: convert or reshape your data.")
    return values


def _validated(model: HSVR, *given: Any, **options: Any) -> Any:
    """Return data validated by scikit-learn, in float64; its errors are re-raised with the argument's name."""
    try:
        return validate_data(model, *given, dtype=np.float64, **options)
    except (TypeError, ValueError) as error:
        names = "X, y" if len(given) > 1 else "X"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{names}: {error}") from error


def _predictions(models: Sequence[SVR], points: Array) -> Array:
    """Return the predictions (N, M) of one layer."""
    return np.stack([model.predict(points) for model in models], axis=1)


def _means(values: Array, index: npt.NDArray[np.intp], counts: npt.NDArray[np.intp]) -> Array:
    """Return the mean of the rows with the same index."""
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, index.reshape(-1), values)
    return sums / counts[:, None]
