"""``python -m lightning_koopman.demo reproduce``."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from lightning_koopman.demo.data import load
from lightning_koopman.demo.experiments.runner import cores, run_all
from lightning_koopman.demo.reproduce.claims import claims, every
from lightning_koopman.demo.reproduce.figures import gallery, panels
from lightning_koopman.demo.reproduce.plan import FIGURES, PLANS, wanted
from lightning_koopman.demo.reproduce.report import page
from lightning_koopman.demo.reproduce.results import Results
from lightning_koopman.demo.reproduce.tasks import tasks


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_koopman.demo reproduce",
        description="Run the paper's experiments and write figures, tables and a report.  An interrupted run "
        "continues where it stopped; finished parts are not repeated.",
    )
    parser.add_argument("what", nargs="?", choices=["all"], help="everything (the default)")
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=[], help="figures to reproduce (S: supplement)")
    parser.add_argument("--table", nargs="+", choices=["1"], default=[], help="tables to reproduce")
    parser.add_argument("--scale", choices=PLANS, default="small", help="full: 60,000 images, 1000 epochs, for a GPU")
    parser.add_argument("--data", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"), help="folder of MNIST")
    parser.add_argument("--output", type=Path, default=Path("koopman_reproduce"), help="folder of runs and report")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: one per core; one on a GPU)")
    options = parser.parse_args(arguments)
    if options.what and (options.figure or options.table):
        parser.error("`all` cannot be combined with --figure or --table")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is missing, write the report, and return its path."""
    options = parse(arguments)
    chosen = bool(options.figure or options.table)
    figures = tuple(figure for figure in FIGURES if figure in options.figure or not chosen)
    plan, device = PLANS[options.scale], "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(options.output / plan.name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    needed = wanted(plan, figures)
    if needed[0]:
        try:
            load(plan.dataset, root=options.data, n_train=1)  # download data, or fail, before any work
        except FileNotFoundError as error:
            others = " ".join(figure for figure in FIGURES if not wanted(plan, (figure,))[0])
            raise SystemExit(f"{error} Without it: --figure {others}, or --table 1.") from None
    missing = tasks(plan, options.data, folder, device, needed)
    jobs = options.jobs or (1 if device == "cuda" else cores())
    print(f"{len(missing)} trainings to go, {jobs} at a time; results in {folder}", flush=True)
    run_all(missing, jobs)

    complete = tuple(
        figure for figure in FIGURES if not tasks(plan, options.data, folder, device, wanted(plan, (figure,)))
    )  # figures completed by earlier runs are shown too
    results = Results(
        plan, folder, complete, table_1=bool(options.table) or not chosen or (folder / "table-1.npz").exists()
    )
    found = claims(results)
    pictures = {figure: panels(results, figure) for figure in found}
    (folder / "figures").mkdir(exist_ok=True)
    for each in pictures.values():
        for panel in each:
            (folder / "figures" / f"{panel.name}.svg").write_bytes(panel.svg)
    for name, picture in gallery(pictures).items():
        (folder / f"gallery-{name}.png").write_bytes(picture)
    images = "all" if plan.n_images is None else f"{plan.n_images:,}"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cores()} CPU cores"
    about = (
        f"Scale “{plan.name}”: {images} images of {plan.dataset}, {plan.epochs} epochs (paper: 60,000 and 1000);",
        f"pruned after {plan.prune_at[0]} and {plan.prune_at[1]} epochs (paper: 100 and 500); noisy signals:",
        f"{plan.noise_epochs} epochs, {plan.seeds} seeds. Run on {where} ({platform.machine()}), PyTorch",
        f"{torch.__version__}, lightning_koopman {version('lightning_koopman')}.",
    )
    report = folder / "report.html"
    report.write_text(page(results, found, pictures, about), encoding="utf-8")
    for claim in every(found):
        print(f"{claim.verdict:>14}  {claim.figure:>3}  {claim.claim}")
    for path in (*results.write_tables(folder), report):
        print(path)
    return report
