"""What the paper claims, what was found, and a verdict by a rule that is stated."""

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
FAST, DROP = 5, 0.1  # epochs, and the share of the loss that may be left then
MARGIN = 0.05  # of importance near 1 by which a training must exceed the random walk
SLOWED = 0.5  # of its fastest twelve epochs' squared distance by which a training must have slowed down
NEAR_ZERO, IMPORTANT = 0.5, 0.01  # modulus; share of the largest importance
COMPARABLE = 0.01  # nats
LOST = 0.002  # of the accuracy
POOR, FLAT = 0.5, 0.5  # times the average's error; of the clean signal's standard deviation
RISE = 1.01  # times a loss
CLOSE = 2.0  # times ε
ENOUGH = 1.2  # times the least error
L2 = ("L2", LOSSES[-1])  # and the same, stopped early


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what came of it.

    Attributes:
        figure: Where the paper makes it.
        claim: The claim.
        ours: What was found, with the baseline beside it.
        verdict: ``HOLDS``, ``PART`` or ``FAILS``.
        rule: When it holds.
    """

    figure: str
    claim: str
    ours: str
    verdict: str
    rule: str


def judge(parts: list[bool]) -> str:
    """All, some or none."""
    return HOLDS if all(parts) else PART if any(parts) else FAILS


def claims(results: Results) -> dict[str, list[Claim]]:
    """The claims by figure, for the figures that are shown."""
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
    """All of them."""
    for each in found.values():
        yield from each


def fast(results: Results, figure: str) -> Claim:
    """Sections 3 and 9."""
    losses = results.curves(SPECTRA[figure])[:, TRAIN]
    before = max(CHANCE, float(losses[0]))
    left = float(losses[min(FAST, len(losses)) - 1]) / before
    return Claim(
        figure,
        "Training is very fast, with a large drop of the loss after a few epochs.",
        f"After {FAST} epochs the training loss is {losses[min(FAST, len(losses)) - 1]:.3g}: {left:.1%} of "
        f"{'chance, ' if before == CHANCE else 'its mean in the first epoch, '}{before:.3g}.",
        HOLDS if left < DROP else FAILS,
        f"less than {DROP:.0%} is left after {FAST} epochs",
    )


def cluster(results: Results, figure: str) -> Claim:
    """Sections 3 and 9, the weights."""
    start, epochs = SPECTRA[figure], results.plan.weight_epochs
    found = [results.spectrum("weights", start, each) for each in epochs]
    ours, walk = ([float(each[f"{kind}_unit_fraction"]) for each in found] for kind in ("training", "walk"))
    near = [int((np.abs(each["training_eigenvalues"] - 1) < 0.05).sum()) for each in found]
    grows = ours[-1] > ours[0] + MARGIN
    apart = ours[-1] > walk[-1] + MARGIN
    return Claim(
        figure,
        "The more snapshots of the weights are taken, the more important eigenvalues appear and cluster around 1.",
        f"Within 0.05 of 1 lie {listed_shares(ours)} of the importance after "
        f"{', '.join(map(str, epochs))} epochs; of a random walk with the same step lengths "
        f"{listed_shares(walk)}. The number of eigenvalues there: {', '.join(map(str, near))}.",
        judge([grows, apart]),
        f"the share grows by {MARGIN:g}, and ends as much above the random walk's",
    )


def steady(results: Results, figure: str) -> Claim:
    """Sections 3 and 9, the weights, by measures that the number of snapshots does not enter."""
    start, epochs = SPECTRA[figure], results.plan.weight_epochs
    found = [results.spectrum("weights", start, each) for each in epochs]
    ours, walk, slowing = (
        [float(each[name]) for each in found] for name in ("training_newest", "walk_newest", "slowing")
    )
    return Claim(
        figure,
        "The same, of equally many snapshots: as training goes on, the weights' importance gathers near 1.",
        f"Of the newest {WINDOW} snapshots {listed_shares(ours)} of the importance lie within 0.05 of 1 after "
        f"{', '.join(map(str, epochs))} epochs; of a random walk with the same step lengths {listed_shares(walk)}. The "
        f"squared distance of twelve epochs has fallen by {listed_shares(slowing)} from that of the fastest twelve.",
        judge([ours[-1] > ours[0] + MARGIN, ours[-1] > walk[-1] + MARGIN, slowing[-1] > SLOWED]),
        f"the share grows by {MARGIN:g}, ends as much above the random walk's, and the weights slow down by "
        f"{SLOWED:.0%}; a walk slows down by nothing",
    )


def loss_cluster(results: Results, figure: str) -> Claim:
    """Sections 3 and 9, the loss."""
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
        "Eigenvalues of the training loss cluster close to 0; as more snapshots are taken, important ones show up "
        "close to 1.",
        f"Moduli below {NEAR_ZERO} have {share('training'):.0%} of the importance after {epochs[0]} epochs; after "
        f"{epochs[-1]} the important eigenvalue nearest to 1 is {nearest('training'):.3f} away from it. Of a random "
        f"walk with the same step lengths: {share('walk'):.0%}, and {nearest('walk'):.3f}.",
        judge([share("training") > 0.5, nearest("training") < 0.05, apart]),
        f"moduli below {NEAR_ZERO} have more than half of the importance at first, and {MARGIN:g} more than the random "
        f"walk's; in the end one with {IMPORTANT:.0%} of the largest importance lies within 0.05 of 1",
    )


def memorises(results: Results, figure: str) -> Claim:
    """Section 3."""
    curves = results.curves(SPECTRA[figure])
    least, end = float(curves[:, TEST].min()), float(curves[-1, TEST])
    rises = end > 1.2 * least
    try:
        normal = results.curves("normal")[len(curves) - 1]
    except FileNotFoundError:
        below, more = False, " The run from standard normal weights, of Figure S3, is not there to compare with."
    else:
        below = end < float(normal[TEST])
        more = f" From standard normal weights it is {normal[TEST]:.3g} (accuracy {normal[ACCURACY]:.1%})."
    return Claim(
        figure,
        "The training set is learned by heart: the test loss rises, but ends lower than from standard normal weights.",
        f"The test loss falls to {least:.3g} and ends at {end:.3g} (accuracy {curves[-1, ACCURACY]:.1%}).{more}",
        judge([rises, below]),
        "it ends 20 % above its minimum, and below that from standard normal weights",
    )


def diverges(results: Results, figure: str) -> Claim:
    """Section 9."""
    curves, half = results.curves("normal"), results.plan.epochs
    middle, end = curves[half - 1], curves[-1]
    return Claim(
        figure,
        "From standard normal weights training diverges, and goes on diverging for as many epochs again.",
        f"The test loss is {middle[TEST]:.3g} after {half} epochs and {end[TEST]:.3g} after {len(curves)} (least: "
        f"{curves[:, TEST].min():.3g}); the training loss {middle[TRAIN]:.3g} and {end[TRAIN]:.3g}, the test accuracy "
        f"{middle[ACCURACY]:.1%} and {end[ACCURACY]:.1%}.",
        judge([bool(end[column] > RISE * middle[column]) for column in (TEST, TRAIN)]),
        f"test loss and training loss are more than {RISE - 1:.0%} higher after twice the epochs",
    )


def prunes(results: Results, figure: str) -> Claim:
    """Section 4 and supplement, section 10."""
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
        f"Pruned after {point} epochs, {results.plan.further} epochs later. {'; '.join(words)}. By the same rule it "
        f"{judge(parts['magnitude'])} for magnitude pruning and {judge(parts['random'])} for a random mask, which both "
        f"keep the weights they leave. The masks agree with magnitude's on {' and '.join(agreements)} of the weights "
        f"(all {int(branch['snapshots'])} snapshots, the mode nearest 1 and those ranked above it).",
        judge(parts[f"algorithm {algorithm}"]),
        f"training losses differ by less than {COMPARABLE:g} nats, the test loss is no higher, and the test accuracy "
        f"at most {LOST:.1%} lower, for both starts",
    )


def heuristic(results: Results, figure: str) -> Claim:
    """Section 5."""
    errors, papers = results.scales["errors"], float(results.scales["papers"])
    return Claim(
        figure,
        "Three standard deviations of the Gaussian in half a period, σ = 1/(6f), suit a wave of frequency f.",
        f"A single layer of that scale misses a wave by {papers:.2f} ε; the best of 25 scales by {errors.min():.2f} ε, "
        f"and {int((errors < ENOUGH * errors.min()).sum())} of those 25, from 1/(60f) to 1/f, do as well.",
        HOLDS if papers < ENOUGH * errors.min() else FAILS,
        f"its error is at most {ENOUGH:g} times the least",
    )


def average(results: Results, figure: str) -> Claim:
    """Section 6."""
    errors, stopped = (mean_errors(results, loss) for loss in L2)
    spreads = [results.spread("L2", noise) for noise in NOISES]
    return Claim(
        figure,
        "The L2 loss reconstructs the clean signal poorly at every noise level: basically its average.",
        f"Its error against the clean signal is {listed(errors)} at noise {', '.join(map(str, NOISES))}; the average "
        f"itself has {results.mean_error:.2f}, L2 that is stopped early {listed(stopped)}. The fits vary by "
        f"{listed(spreads)} times the clean signal's standard deviation, where an average would not vary at all.",
        judge([min(errors) > POOR * results.mean_error, max(spreads) < FLAT]),
        f"at every noise level its error is more than {POOR:g} times the average's, and the fit varies by less than "
        f"{FLAT:g} times the clean signal's standard deviation",
    )


def rejects(results: Results, figure: str) -> Claim:
    """Section 6."""
    errors = {loss: mean_errors(results, loss) for loss in LOSSES}
    shown = {loss: listed(each) for loss, each in errors.items()}

    def best(first: str, second: str) -> list[bool]:
        return [a < min(b, c) for a, b, c in zip(errors[first], errors["L2"], errors[second], strict=True)]

    return Claim(
        figure,
        "Sobolev loss 1 performs best at reconstructing the clean signal, even under much noise.",
        f"Errors at noise {', '.join(map(str, NOISES))}. Equations 7 and 8 as written: Sobolev 1 "
        f"{shown['Sobolev 1, literal']}, Sobolev 2 {shown['Sobolev 2, literal']}. With all modes up to the scale: "
        f"Sobolev 1 {shown['Sobolev 1']}, Sobolev 2 {shown['Sobolev 2']}. L2: {shown['L2']}; L2 stopped early: "
        f"{shown['L2, early stop']}.",
        judge(best("Sobolev 1, literal", "Sobolev 2, literal") + best("Sobolev 1", "Sobolev 2")),
        "Sobolev 1 beats L2 and Sobolev 2 at every noise level, as written and with all modes up to the scale",
    )


def mean_errors(results: Results, loss: str) -> list[float]:
    """Mean error over the seeds, a noise level each."""
    return [float(results.noisy_errors(loss, noise).mean()) for noise in NOISES]


def listed(values: list[float]) -> str:
    """Numbers in a sentence."""
    return ", ".join(f"{each:.2f}" for each in values)


def listed_shares(values: list[float]) -> str:
    """Shares in a sentence."""
    return ", ".join(f"{each:.1%}" for each in values)


def layers(results: Results) -> Claim:
    """Section 11, Table 1."""
    fft = sum(int(mine) == row.fft_layers for mine, row in zip(results.table["fft_layers"], TABLE, strict=True))
    dmd = sum(int(mine) == row.dmd_layers for mine, row in zip(results.table["dmd_layers"], TABLE, strict=True))
    return Claim(
        "T1",
        "The spectrum determines the number of layers: Table 1, seven for x + sin(2πx⁴).",
        f"The number is the paper's for {fft} of 16 functions by the Fourier transform and for {dmd} by DMD; seven for "
        f"x + sin(2πx⁴): {'yes' if int(results.table['fft_layers'][8]) == 7 else 'no'}.",
        judge([fft == len(TABLE), dmd == len(TABLE)]),
        "all 16 numbers of layers agree, by both methods",
    )


def accurate(results: Results) -> Claim:
    """Section 11, Table 1."""
    close = [results.table[f"{method}_error"] < CLOSE * results.table["epsilon"] for method in ("fft", "dmd")]
    counts = [int(each.sum()) for each in close]
    return Claim(
        "T1",
        "With that number of layers the error of every model is comparable to ε.",
        f"It is below {CLOSE:g} ε for {counts[0]} of 16 functions by the Fourier transform and {counts[1]} by DMD; "
        "sin(200πx) has ten samples a period, and DMD takes the cubic for a trend (in the paper too).",
        HOLDS if min(counts) == len(TABLE) else PART if min(counts) > len(TABLE) / 2 else FAILS,
        f"all errors are below {CLOSE:g} ε, by both methods; in part if most are",
    )
