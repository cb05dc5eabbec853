"""The paper's claims, what was found here, and a verdict by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lightning_koopman.callbacks.monitor import WINDOW
from lightning_koopman.demo.reproduce.plan import LOSSES, NAMES, NOISES, PRUNED, PRUNINGS, SPECTRA, methods_of
from lightning_koopman.demo.reproduce.results import ACCURACY, TEST, TRAIN, Results
from lightning_koopman.demo.table1 import TABLE

HOLDS, PART, FAILS = "holds", "holds in part", "does not hold"
CHANCE = math.log(10)
FAST, DROP = 5, 0.1  # epochs, and the share of the loss that may be left after them
MARGIN = 0.05  # least excess of the importance near 1 over that of the random walk
SLOWED = 0.5  # least fall of the squared distance of twelve epochs, relative to the fastest twelve
NEAR_ZERO, IMPORTANT = 0.5, 0.01  # modulus; share of the largest importance
COMPARABLE = 0.01  # nats
LOST = 0.002  # largest loss of accuracy
POOR, FLAT = 0.5, 0.5  # times the average's error; times the clean signal's standard deviation
RISE = 1.01  # times a loss
CLOSE = 2.0  # times ε
ENOUGH = 1.2  # times the least error
L2 = ("L2", LOSSES[-1])  # without and with early stopping


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the verdict on it.

    Attributes:
        figure: Figure in which the paper makes it.
        claim: The claim, in words.
        ours: What was found, with the baseline beside it.
        verdict: ``HOLDS``, ``PART`` or ``FAILS``.
        rule: Condition under which it holds.
    """

    figure: str
    claim: str
    ours: str
    verdict: str
    rule: str


def judge(parts: list[bool]) -> str:
    """Return the verdict: all, some or none of the parts hold."""
    return HOLDS if all(parts) else PART if any(parts) else FAILS


def claims(results: Results) -> dict[str, list[Claim]]:
    """Return the claims by figure, for the figures that are shown."""
    found: dict[str, list[Claim]] = {}
    for figure in results.figures:
        makers: list[Callable[[Results, str], Claim]] = []
        if figure in SPECTRA:
            makers = [fast, cluster, steady, loss_cluster, *([diverges] if figure == "S3" else [memorises])]
        elif figure in PRUNINGS:
            makers = [prunes]
        elif figure == "4":
            makers = [heuristic]
        elif figure == "5":
            makers = [average, rejects]
        found[figure] = [make(results, figure) for make in makers]
    if results.table_1:
        found["T1"] = [layers(results), accurate(results)]
    return found


def every(found: dict[str, list[Claim]]) -> Iterator[Claim]:
    """Yield all claims."""
    for each in found.values():
        yield from each


def fast(results: Results, figure: str) -> Claim:
    """Is training fast (sections 3 and 9)?"""
    losses = results.curves(SPECTRA[figure])[:, TRAIN]
    before = max(CHANCE, float(losses[0]))
    left = float(losses[min(FAST, len(losses)) - 1]) / before
    return Claim(
        figure,
        "Training is very fast, with a large drop of the loss after a few epochs.",
        f"After {FAST} epochs the training loss is {losses[min(FAST, len(losses)) - 1]:.3g}: {left:.1%} of "
        f"{'the baseline loss, ' if before == CHANCE else 'its mean in the first epoch, '}{before:.3g}.",
        HOLDS if left < DROP else FAILS,
        f"less than {DROP:.0%} is left after {FAST} epochs",
    )


def cluster(results: Results, figure: str) -> Claim:
    """Do eigenvalues of the weights cluster at 1 (sections 3 and 9)?"""
    start, epochs = SPECTRA[figure], results.plan.weight_epochs
    found = [results.spectrum("weights", start, each) for each in epochs]
    ours, walk = ([float(each[f"{kind}_unit_fraction"]) for each in found] for kind in ("training", "walk"))
    near = [int((np.abs(each["training_eigenvalues"] - 1) < 0.05).sum()) for each in found]
    grows = ours[-1] > ours[0] + MARGIN
    apart = ours[-1] > walk[-1] + MARGIN
    return Claim(
        figure,
        "The more snapshots of the weights are taken, the more important eigenvalues appear and cluster around 1.",
        f"Share of the importance within 0.05 of 1 after {', '.join(map(str, epochs))} epochs: "
        f"{listed_shares(ours)}; for a random walk with the same step lengths: "
        f"{listed_shares(walk)}. Number of eigenvalues there: {', '.join(map(str, near))}.",
        judge([grows, apart]),
        f"the share grows by more than {MARGIN:g}, and ends more than {MARGIN:g} above the random walk's",
    )


def steady(results: Results, figure: str) -> Claim:
    """Do they cluster by measures independent of the number of snapshots (sections 3 and 9)?"""
    start, epochs = SPECTRA[figure], results.plan.weight_epochs
    found = [results.spectrum("weights", start, each) for each in epochs]
    ours, walk, slowing = (
        [float(each[name]) for each in found] for name in ("training_newest", "walk_newest", "slowing")
    )
    return Claim(
        figure,
        "The same with a fixed number of snapshots: as training goes on, the weights' importance gathers near 1.",
        f"Share of the importance within 0.05 of 1, newest {WINDOW} snapshots after {', '.join(map(str, epochs))} "
        f"epochs: {listed_shares(ours)}; for a random walk with the same step lengths: {listed_shares(walk)}. The "
        f"squared distance of twelve epochs has fallen by {listed_shares(slowing)} from that of the fastest twelve.",
        judge([ours[-1] > ours[0] + MARGIN, ours[-1] > walk[-1] + MARGIN, slowing[-1] > SLOWED]),
        f"the share grows by more than {MARGIN:g}, ends more than {MARGIN:g} above the random walk's, and the squared "
        f"distance falls by more than {SLOWED:.0%} (a random walk does not slow down)",
    )


def loss_cluster(results: Results, figure: str) -> Claim:
    """Do eigenvalues of the loss cluster at 0, then at 1 (sections 3 and 9)?"""
    start, epochs = SPECTRA[figure], results.plan.loss_epochs
    first, last = (results.spectrum("loss", start, each) for each in (epochs[0], epochs[-1]))

    def share(kind: str) -> float:
        inner = np.abs(first[f"{kind}_eigenvalues"]) < NEAR_ZERO
        return float(first[f"{kind}_importance"][inner].sum() / first[f"{kind}_importance"].sum())

    def nearest(kind: str) -> float:
        large = last[f"{kind}_importance"] > IMPORTANT * last[f"{kind}_importance"].max()
        return float(np.abs(last[f"{kind}_eigenvalues"][large] - 1).min())

    apart = share("training") > share("walk") + MARGIN
    return Claim(
        figure,
        "Eigenvalues of the training loss cluster close to 0; as more snapshots are taken, important ones appear "
        "close to 1.",
        f"Eigenvalues of modulus below {NEAR_ZERO} carry {share('training'):.0%} of the importance after {epochs[0]} "
        f"epochs. After {epochs[-1]} the important eigenvalue nearest to 1 is {nearest('training'):.3f} away from it. "
        f"For a random walk with the same step lengths: {share('walk'):.0%}, and {nearest('walk'):.3f}.",
        judge([share("training") > 0.5, nearest("training") < 0.05, apart]),
        f"at first, moduli below {NEAR_ZERO} carry more than half of the importance, {MARGIN:g} more than the random "
        f"walk's; at the end, one with at least {IMPORTANT:.0%} of the largest importance lies within 0.05 of 1",
    )


def memorises(results: Results, figure: str) -> Claim:
    """Is the training set memorized (section 3)?"""
    curves = results.curves(SPECTRA[figure])
    least, end = float(curves[:, TEST].min()), float(curves[-1, TEST])
    rises = end > 1.2 * least
    try:
        normal = results.curves("normal")[len(curves) - 1]
    except FileNotFoundError:
        below, more = False, " The run from standard normal weights (Figure S3) is missing: no comparison."
    else:
        below = end < float(normal[TEST])
        more = f" From standard normal weights it is {normal[TEST]:.3g} (accuracy {normal[ACCURACY]:.1%})."
    return Claim(
        figure,
        "The training set is memorized: the test loss rises, but ends lower than from standard normal weights.",
        f"The test loss falls to {least:.3g} and ends at {end:.3g} (accuracy {curves[-1, ACCURACY]:.1%}).{more}",
        judge([rises, below]),
        "it ends more than 20 % above its minimum, and lower than from standard normal weights",
    )


def diverges(results: Results, figure: str) -> Claim:
    """Does training diverge from standard normal weights (section 9)?"""
    curves, half = results.curves("normal"), results.plan.epochs
    middle, end = curves[half - 1], curves[-1]
    return Claim(
        figure,
        "From standard normal weights training diverges, and keeps diverging when the epochs are doubled.",
        f"The test loss is {middle[TEST]:.3g} after {half} epochs and {end[TEST]:.3g} after {len(curves)} (minimum: "
        f"{curves[:, TEST].min():.3g}); the training loss {middle[TRAIN]:.3g} and {end[TRAIN]:.3g}, the test accuracy "
        f"{middle[ACCURACY]:.1%} and {end[ACCURACY]:.1%}.",
        judge([bool(end[column] > RISE * middle[column]) for column in (TEST, TRAIN)]),
        f"test loss and training loss are more than {RISE - 1:.0%} higher after twice the epochs",
    )


def prunes(results: Results, figure: str) -> Claim:
    """Does a pruned network keep up with the unpruned one (section 4; supplement, section 10)?"""
    algorithm, which = PRUNINGS[figure]
    point = results.plan.prune_at[which]
    end = point + results.plan.further
    parts: dict[str, list[bool]] = {method: [] for method in methods_of(figure)}
    words, agreements = [], []
    for start in PRUNED:
        whole = results.curves(start)
        reference = whole[min(end, len(whole)) - 1]
        ends = {method: results.branch(start, point, method)["curves"][-1] for method in parts}
        for method, each in ends.items():
            parts[method] += [
                bool(abs(each[TRAIN] - reference[TRAIN]) < COMPARABLE),
                bool(each[TEST] <= reference[TEST]),
                bool(each[ACCURACY] >= reference[ACCURACY] - LOST),
            ]
        mine, magnitude, drawn = ends.values()
        branch = results.branch(start, point, f"algorithm {algorithm}")
        agreements.append(f"{float(branch['magnitude_agreement']):.1%} ({NAMES[start]})")
        words.append(
            f"{NAMES[start]}: training loss {mine[TRAIN]:.2g} (unpruned {reference[TRAIN]:.2g}), test loss "
            f"{mine[TEST]:.3g} (unpruned {reference[TEST]:.3g}, magnitude {magnitude[TEST]:.3g}, random mask "
            f"{drawn[TEST]:.3g}), test accuracy {mine[ACCURACY]:.2%} ({reference[ACCURACY]:.2%}, "
            f"{magnitude[ACCURACY]:.2%}, {drawn[ACCURACY]:.2%})"
        )
    return Claim(
        figure,
        f"With 75 % of the weights pruned by Algorithm {algorithm} after {(100, 500)[which]} epochs the network is "
        "comparable on the training set and maintains or beats the unpruned one on the test set.",
        f"Pruned after {point} epochs, compared {results.plan.further} epochs later. {'; '.join(words)}. By the same "
        f"rule it {judge(parts['magnitude'])} for magnitude pruning and {judge(parts['random'])} for a random mask; "
        f"both keep the values of the remaining weights. The masks (all {int(branch['snapshots'])} snapshots, the mode "
        f"nearest 1 and those ranked above it) agree with magnitude's on {' and '.join(agreements)} of the weights.",
        judge(parts[f"algorithm {algorithm}"]),
        f"training losses differ by less than {COMPARABLE:g} nats, the test loss is no higher, and the test accuracy "
        f"at most {LOST:.1%} lower, for both initializations",
    )


def heuristic(results: Results, figure: str) -> Claim:
    """Does the paper's scale suit a wave (section 5)?"""
    errors, papers = results.scales["errors"], float(results.scales["papers"])
    return Claim(
        figure,
        "The scale σ = 1/(6f) suits a wave of frequency f: three standard deviations of the Gaussian in half a period.",
        f"A single layer of that scale has an error of {papers:.2f} ε; the best of 25 scales from 1/(60f) to 1/f has "
        f"{errors.min():.2f} ε, and {int((errors < ENOUGH * errors.min()).sum())} of the 25 do about as well.",
        HOLDS if papers < ENOUGH * errors.min() else FAILS,
        f"its error is less than {ENOUGH:g} times the smallest",
    )


def average(results: Results, figure: str) -> Claim:
    """Does the L2 loss give little more than the average (section 6)?"""
    errors, stopped = (mean_errors(results, loss) for loss in L2)
    spreads = [results.spread("L2", noise) for noise in NOISES]
    return Claim(
        figure,
        "The L2 loss reconstructs the clean signal poorly at every noise level: essentially as its average.",
        f"At noise {', '.join(map(str, NOISES))} its error against the clean signal is {listed(errors)}, with early "
        f"stopping {listed(stopped)}; the average itself has {results.mean_error:.2f}. The fits' standard deviation is "
        f"{listed(spreads)} times the clean signal's; an average would have 0.",
        judge([min(errors) > POOR * results.mean_error, max(spreads) < FLAT]),
        f"at every noise level its error is more than {POOR:g} times the average's, and the fit's standard deviation "
        f"less than {FLAT:g} times the clean signal's",
    )


def rejects(results: Results, figure: str) -> Claim:
    """Does Sobolev loss 1 perform best under noise (section 6)?"""
    errors = {loss: mean_errors(results, loss) for loss in LOSSES}
    shown = {loss: listed(each) for loss, each in errors.items()}

    def best(first: str, second: str) -> list[bool]:
        return [a < min(b, c) for a, b, c in zip(errors[first], errors["L2"], errors[second], strict=True)]

    return Claim(
        figure,
        "Sobolev loss 1 performs best at reconstructing the clean signal, even under much noise.",
        f"Errors at noise {', '.join(map(str, NOISES))}. Equations 7 and 8 as written: Sobolev 1 "
        f"{shown['Sobolev 1, literal']}, Sobolev 2 {shown['Sobolev 2, literal']}. With all modes up to the scale: "
        f"Sobolev 1 {shown['Sobolev 1']}, Sobolev 2 {shown['Sobolev 2']}. L2: {shown['L2']}; L2 with early stopping: "
        f"{shown['L2, early stop']}.",
        judge(best("Sobolev 1, literal", "Sobolev 2, literal") + best("Sobolev 1", "Sobolev 2")),
        "Sobolev 1 beats L2 and Sobolev 2 at every noise level, as written and with all modes up to the scale",
    )


def mean_errors(results: Results, loss: str) -> list[float]:
    """Return the mean error over the seeds for each noise level."""
    return [float(results.noisy_errors(loss, noise).mean()) for noise in NOISES]


def listed(values: list[float]) -> str:
    """Format numbers for a sentence."""
    return ", ".join(f"{each:.2f}" for each in values)


def listed_shares(values: list[float]) -> str:
    """Format shares for a sentence."""
    return ", ".join(f"{each:.1%}" for each in values)


def layers(results: Results) -> Claim:
    """Does the spectrum give the paper's number of layers (section 11, Table 1)?"""
    fft = sum(int(mine) == row.fft_layers for mine, row in zip(results.table["fft_layers"], TABLE, strict=True))
    dmd = sum(int(mine) == row.dmd_layers for mine, row in zip(results.table["dmd_layers"], TABLE, strict=True))
    return Claim(
        "T1",
        "The spectrum determines the number of layers: Table 1, seven for x + sin(2πx⁴).",
        f"The number agrees with the paper's for {fft} of 16 functions with the Fourier transform and {dmd} with DMD; "
        f"seven for x + sin(2πx⁴): {'yes' if int(results.table['fft_layers'][8]) == 7 else 'no'}.",
        judge([fft == len(TABLE), dmd == len(TABLE)]),
        "all 16 numbers of layers agree, with both methods",
    )


def accurate(results: Results) -> Claim:
    """Is the error comparable to ε (section 11, Table 1)?"""
    close = [results.table[f"{method}_error"] < CLOSE * results.table["epsilon"] for method in ("fft", "dmd")]
    counts = [int(each.sum()) for each in close]
    return Claim(
        "T1",
        "With that number of layers the error of every model is comparable to ε.",
        f"It is below {CLOSE:g} ε for {counts[0]} of 16 functions with the Fourier transform and {counts[1]} with DMD. "
        "sin(200πx) has only ten samples per period, and DMD treats the cubic as a trend (in the paper too).",
        HOLDS if min(counts) == len(TABLE) else PART if min(counts) > len(TABLE) / 2 else FAILS,
        f"all errors are below {CLOSE:g} ε, with both methods; it holds in part if most are",
    )
