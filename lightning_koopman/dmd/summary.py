"""Summary of a spectrum in plain words."""

from __future__ import annotations

import math

from lightning_koopman.dmd.spectrum import Spectrum

NOTABLE_GROWTH = 1.05  # over the whole window


def summarize(
    spectrum: Spectrum | None,
    surrogate: Spectrum | None,
    *,
    observable: str = "weights",
    radius: float = 0.05,
    max_residual: float = 3e-2,
    every: int = 1,
    unit: str = "epochs",
) -> str:
    """Return a few lines on what a spectrum and its random-walk surrogate show about a training, and what they do not.

    Args:
        spectrum: The training's spectrum, or None if there is none yet.
        surrogate: The random walk's spectrum, or None.
        observable: What was observed.
        radius: Radius of the disc around 1.
        max_residual: Largest residual of a trusted eigenvalue.
        every: Epochs or steps between two snapshots, in the given unit.
        unit: ``"epochs"`` or ``"steps"``.

    Example:
        >>> from lightning_koopman.dmd.summary import summarize
        >>> summarize(None, None)
        'No Koopman spectrum yet: too few snapshots of the weights.'
    """
    if spectrum is None or surrogate is None:
        subject = "the weights" if observable == "weights" else observable
        return f"No Koopman spectrum yet: too few snapshots of {subject}."
    lines = [
        _model(spectrum, observable),
        _fixed_point(spectrum),
        _cluster(spectrum, surrogate, radius),
        _rate(spectrum, max_residual, every, unit),
    ]
    moduli = abs(spectrum.eigenvalues)
    growing = spectrum.trusted(max_residual) & (moduli > 1.0 + spectrum.residuals)
    growing &= moduli**spectrum.n_snapshots > NOTABLE_GROWTH
    if growing.any() and not spectrum.full_rank:
        lines.append(
            f"Growth: {int(growing.sum())} trusted eigenvalue(s) lie outside the unit circle, up to |λ| = "
            f"{moduli[growing].max():.4f}: a part of the training still grows."
        )
    if spectrum.sketch_errors is not None:
        lines.append(
            "Sketch: computed from random combinations of the weights, which moves the eigenvalues by about "
            f"{spectrum.sketch_error():.1g} (standard error, weighted by importance)."
        )
    return "\n".join(f"- {line}" for line in lines)


def _model(spectrum: Spectrum, observable: str) -> str:
    text = f"Koopman spectrum of {observable} from the last {spectrum.n_snapshots} snapshots: rank {spectrum.rank}"
    if spectrum.full_rank:
        return f"{text}, the largest possible: any data would be fitted, so small residuals certify nothing."
    return f"{text}; the linear model's relative error from one snapshot to the next is {_percent(spectrum.misfit)}."


def _fixed_point(spectrum: Spectrum) -> str:
    nearest = abs(spectrum.eigenvalues - 1.0).argmin()
    distance, residual = abs(spectrum.eigenvalues[nearest] - 1.0), spectrum.residuals[nearest]
    same = "it cannot be told from 1. A random walk has such an eigenvalue, too."
    return (
        f"Fixed direction: the eigenvalue nearest to 1 is {_number(spectrum.eigenvalues[nearest])} with residual "
        f"{residual:.1e}: {same if distance <= residual else 'it is not 1.'}"
    )


def _cluster(spectrum: Spectrum, surrogate: Spectrum, radius: float) -> str:
    ours, walk = spectrum.unit_fraction(radius), surrogate.unit_fraction(radius)
    text = (
        f"Cluster at 1: {_percent(ours)} of the importance lies within {radius:g} of 1; for a random walk with the "
        f"same step lengths it is {_percent(walk)}"
    )
    if abs(ours - walk) < 0.1:
        return f"{text}. That difference is too small to be evidence of convergence."
    if ours > walk:
        return f"{text}. The training has a larger stationary part than the walk."
    return f"{text}. The training has a smaller stationary part than the walk."


def _rate(spectrum: Spectrum, max_residual: float, every: int, unit: str) -> str:
    slowest = math.nan if spectrum.full_rank else spectrum.slowest_modulus(max_residual)
    if math.isnan(slowest):
        return "Spectral rate: no other eigenvalue is certain enough to give a rate of convergence."
    if slowest == 0.0:
        return "Spectral rate: every trusted eigenvalue other than 1 is 0, so that part vanishes in one step."
    text = f"Spectral rate: the slowest trusted eigenvalue other than 1 has |λ| = {slowest:.4f}"
    if slowest >= 1.0:
        return f"{text}, so that part does not decay."
    return f"{text}, so that part halves every {every * math.log(0.5) / math.log(slowest):.1f} {unit}."


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def _number(value: complex) -> str:
    return f"{value.real:.5f}" if value.imag == 0 else f"{value.real:.5f} {value.imag:+.5f}i"
