"""One self-contained page: each figure with the paper's claims, what was found, and a verdict."""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Sequence

from lightning_koopman.demo.reproduce.claims import FAILS, HOLDS, PART, Claim, every
from lightning_koopman.demo.reproduce.figures import Panel
from lightning_koopman.demo.reproduce.plan import NAMES, PRUNINGS, SPECTRA
from lightning_koopman.demo.reproduce.results import Results
from lightning_koopman.demo.table1 import TABLE

MARKS = {HOLDS: ("yes", "✓"), PART: ("part", "◐"), FAILS: ("no", "✗")}
STYLE = """
:root { --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --blue: #0b6e99; --card: #f6f8fa }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.1rem 4rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p { max-width: 46rem } .soft { color: var(--soft) } a { color: var(--blue) }
ol.overview { list-style: none; margin: 1.2rem 0; padding: 0 }
ol.overview li { display: grid; grid-template-columns: 8.5rem 6rem 1fr; gap: .2rem .8rem; padding: .45rem 0;
  border-bottom: 1px solid var(--line) }
.verdict { font-weight: 600; white-space: nowrap }
.yes { color: #1a6b2f } .part { color: #8a5a00 } .no { color: #b02a1c }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .6rem;
  margin: .8rem 0 }
.panels img { width: 100%; max-width: 26rem; height: auto; display: block }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .93rem; max-width: 46rem }
.claim { background: var(--card); border-left: 4px solid var(--line); padding: .7rem 1rem; margin: .8rem 0;
  border-radius: 0 .4rem .4rem 0; max-width: 60rem }
.claim.yes { border-color: #1a6b2f; color: inherit } .claim.part { border-color: #c98a1b; color: inherit }
.claim.no { border-color: #b02a1c; color: inherit }
.claim p { margin: .25rem 0 } .claim .rule { color: var(--soft); font-size: .88rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.differs { font-weight: 600; color: #b02a1c }
@media (max-width: 40rem) { ol.overview li { grid-template-columns: auto 1fr } ol.overview li span:last-child {
  grid-column: 1 / -1 } h1 { font-size: 1.4rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } h2 { break-after: avoid }
  .claim, .panels img, tr { break-inside: avoid }
  .panels { grid-template-columns: repeat(auto-fit, minmax(4.2cm, 1fr)) }
  .scroll { overflow: visible } table { font-size: 7pt } th, td { padding: .1rem .25rem; white-space: normal }
  a { color: inherit; text-decoration: none } }
"""


def heading(figure: str) -> str:
    """Return the heading of a figure."""
    if figure == "T1":
        return "Table 1: layers of hierarchical SVR"
    about = (
        f"spectra of the training, {NAMES[SPECTRA[figure]]} weights"
        if figure in SPECTRA
        else f"pruning by Algorithm {PRUNINGS[figure][0]}"
        if figure in PRUNINGS
        else {"4": "the scale of a frequency", "5": "a signal through noise"}[figure]
    )
    return f"Figure {figure.removeprefix('S')}{' of the supplement' if figure.startswith('S') else ''}: {about}"


def caption(results: Results, figure: str) -> str:
    """Return the caption of a figure: what to look at."""
    if figure in SPECTRA:
        return (
            "Filled: eigenvalues of the training, larger if more important. Hollow: those of a random walk "
            "with the same step lengths. Look at whether the filled ones gather at 1, on the right, and the hollow "
            "ones do not. Percentages: the share of the importance within 0.05 of 1."
        )
    if figure in PRUNINGS:
        point = results.plan.prune_at[PRUNINGS[figure][1]]
        return (
            f"75 % of the weights are pruned after epoch {point} (dotted). Look at whether the Koopman line returns to "
            "the unpruned one, and whether it differs from magnitude's. A random mask keeps the values of the "
            "remaining weights."
        )
    if figure == "4":
        return (
            "Left: the Gaussian that the paper assigns to a wave. Right: the error of a single layer on the wave, by "
            "its scale. Look at how wide the valley around the dashed line, the paper's choice, is."
        )
    if figure == "5":
        return (
            "Black: the clean signal; gray: noisy samples; color: the fit at the last epoch, first seed. Sobolev "
            "losses here use all modes up to the scale; “literal” is equation 7 as printed."
        )
    return "Dots: our errors; bars: the paper's. A value of 1 is the required accuracy."


def page(
    results: Results, found: dict[str, list[Claim]], pictures: dict[str, list[Panel]], about: Sequence[str]
) -> str:
    """Return the whole page as HTML."""
    verdicts = [claim.verdict for claim in every(found)]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in MARKS)
    rows = "".join(
        f"<li><span class='verdict {MARKS[claim.verdict][0]}'>{MARKS[claim.verdict][1]} {claim.verdict}</span>"
        f"<span><a href='#{claim.figure}'>{short(claim.figure)}</a></span><span>{html.escape(claim.claim)}</span></li>"
        for claim in every(found)
    )
    sections = "".join(section(results, figure, each, pictures[figure]) for figure, each in found.items())
    title = "Applications of Koopman Mode Analysis to Neural Networks, reproduced"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width, "
        f"initial-scale=1'><title>{title}</title><style>{STYLE}</style><body><h1>{title}</h1>"
        f"<p>What the paper of I. Manojlović et al. (2020) claims, and what <code>python -m lightning_koopman.demo "
        f"reproduce --scale {results.plan.name}</code> found: {counts}. Each verdict follows from the rule "
        f"stated beneath it. There is one training per initialization, so small differences may be chance.</p>"
        f"<p class='soft'>{html.escape(' '.join(about))}</p><ol class='overview'>{rows}</ol>{sections}</body></html>\n"
    )


def short(figure: str) -> str:
    """Return a figure's name for the overview."""
    return "Table 1" if figure == "T1" else f"Figure {figure}"


def section(results: Results, figure: str, found: Sequence[Claim], pictures: Sequence[Panel]) -> str:
    """Return a figure with its claims as HTML."""
    images = "".join(
        f"<div class='panels'>{''.join(map(image, group))}</div>"
        for _, group in itertools.groupby(pictures, key=lambda panel: panel.group)
    )
    cards = "".join(
        f"<div class='claim {MARKS[each.verdict][0]}'><p><b>The paper:</b> {html.escape(each.claim)}</p>"
        f"<p><b>Here:</b> {html.escape(each.ours)}</p><p><span class='verdict {MARKS[each.verdict][0]}'>"
        f"{MARKS[each.verdict][1]} {each.verdict}</span> <span class='rule'>It holds if {html.escape(each.rule)}."
        f"</span></p></div>"
        for each in found
    )
    table = table_1(results) if figure == "T1" else ""
    return (
        f"<h2 id='{figure}'>{html.escape(heading(figure))}</h2><figure>{images}"
        f"<figcaption>{html.escape(caption(results, figure))}</figcaption></figure>{table}{cards}"
    )


def image(panel: Panel) -> str:
    """Return a panel as an HTML image."""
    data = base64.b64encode(panel.svg).decode()
    return f"<img alt='{html.escape(panel.title)}' src='data:image/svg+xml;base64,{data}'>"


def table_1(results: Results) -> str:
    """Return Table 1 as HTML, with our values before the paper's."""
    columns = ("function", "ε", "paper", "layers, FFT", "paper", "error", "paper", "layers, DMD", "paper", "error")
    head = "".join(f"<th>{each}</th>" for each in columns)
    body = ""
    for index, row in enumerate(TABLE):
        cells = [f"<td>{html.escape(row.name)}</td>"]
        for name in ("epsilon", "fft_layers", "fft_error", "dmd_layers", "dmd_error"):
            ours, theirs = results.table[name][index], getattr(row, name)
            differs = ours != theirs if name.endswith("layers") else abs(ours / theirs - 1) > 0.05
            shown = f"{int(ours)}" if name.endswith("layers") else f"{ours:.3g}"
            cells.append(f"<td{' class=differs' if differs else ''}>{shown}</td><td>{theirs:g}</td>")
        body += f"<tr>{''.join(cells)}</tr>"
    return (
        f"<div class='scroll'><table><thead><tr>{head}<th>paper</th></tr></thead><tbody>{body}</tbody></table></div>"
        "<p class='soft'>Red: a different number of layers, or an ε or error that differs by more than 5 %.</p>"
    )
