"""The trainings that are read: data, networks, optimizers, rates and schedules."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.training import Case, Part, Training, data_of
from lightning_koopman.demo.experiments.training import BATCH

PROBLEMS = ("digits", "friedman", "mnist", "augmented", "resnet", "transformer")
N_TRAIN, N_SCORED = 3000, 1500  # samples per epoch; samples to measure a loss on
CONTEXT, WIDTH, ROUND = 64, 64, 100  # transformer: tokens, features, steps per snapshot
RATES = {"adam": (3e-4, 1e-3, 1e-2), "adamw": (3e-4, 1e-3, 5e-3), "sgd": (0.01, 0.05, 0.5)}
KNOWN, UNSEEN = (0,), (1, 2)  # seeds


# losses of networks that ignore their input: entropy of the classes, variance, entropy of single characters
BASELINES = {"digits": 2.303, "friedman": 1.0, "mnist": 2.301, "augmented": 2.301, "resnet": 2.301, "transformer": 3.25}


@dataclass(frozen=True)
class Setting:
    """One training."""

    problem: str
    optimizer: str
    schedule: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.problem}-{self.optimizer}-{self.schedule}-{self.rate:g}-{self.seed}"

    @property
    def baseline(self) -> float:
        return BASELINES[self.problem]

    def learned(self, loss: float) -> bool:
        """Whether a loss is below half of the baseline loss (two thirds for the transformer)."""
        return loss < (2 / 3 if self.problem == "transformer" else 0.5) * self.baseline

    @property
    def epochs(self) -> int:
        return {"digits": 80, "friedman": 80, "mnist": 50, "augmented": 50}.get(self.problem, 36)


def settings(problem: str, seed: int) -> list[Setting]:
    """Return the trainings on one problem: three constant rates and two schedules."""
    kinds = ("adamw" if problem in ("resnet", "transformer") else "adam", "sgd")
    found = [Setting(problem, kind, "constant", rate, seed) for kind in kinds for rate in RATES[kind]]
    return found + [
        Setting(problem, kind, plan, RATES[kind][1], seed) for kind, plan in zip(kinds, ("cosine", "step"), strict=True)
    ]


SETTINGS = [each for seed, problem in product((*KNOWN, *UNSEEN), PROBLEMS) for each in settings(problem, seed)]


def factor(setting: Setting, epoch: int) -> float:
    """Return the learning rate of an epoch (from 0) relative to the first."""
    if setting.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / setting.epochs))
    return 0.1 ** (epoch * 2 // setting.epochs) if setting.schedule == "step" else 1.0


class Block(nn.Module):
    """A residual block with batch normalization."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Transformer(nn.Module):
    """A two-layer character model."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden)).transpose(1, 2)


def scored(setting: Setting) -> int:
    """Return the number of training samples to measure a loss on."""
    return 200 if setting.problem == "transformer" else N_SCORED


@cache
def text() -> tuple[Tensor, int]:
    """Return the characters of the standard library's sources, and the size of the vocabulary."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    letters = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)[:4_000_000]
    codes = torch.tensor([min(ord(letter), 127) for letter in letters])
    return codes, 128


def parts_of(problem: str, root: Path | None, *, n_scored: int = N_SCORED) -> tuple[Part, Part, Part]:
    """Return inputs and targets for training, validation and test."""
    if problem != "transformer":
        train, validation, test = data_of({"augmented": "mnist", "resnet": "mnist"}.get(problem, problem), root)
        return tuple(
            (x[:most], y[:most])
            for (x, y), most in zip((train, validation, test), (N_TRAIN, n_scored, n_scored), strict=True)
        )  # type: ignore[return-value]
    codes, _ = text()
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    cuts = windows[:-400], windows[-400:-200], windows[-200:]
    return tuple((each[:, :-1], each[:, 1:]) for each in cuts)  # type: ignore[return-value]


def network_of(setting: Setting) -> nn.Module:
    """Return a network initialized with the setting's seed."""
    torch.manual_seed(setting.seed)
    if setting.problem == "transformer":
        return Transformer(text()[1])
    if setting.problem == "resnet":
        blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
        stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    problem = "mnist" if setting.problem == "augmented" else setting.problem
    return Training(Case(problem, "he", setting.optimizer, setting.seed)).network


def optimizer_of(setting: Setting, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer; SGD has momentum on digits and friedman only."""
    if setting.optimizer == "sgd":
        momentum = 0.9 if setting.problem in ("digits", "friedman") else 0.0
        rate = setting.rate * (1 - momentum) * (1 if setting.problem != "transformer" else 4)
        return torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    kind = torch.optim.AdamW if setting.optimizer == "adamw" else torch.optim.Adam
    return kind(network.parameters(), lr=setting.rate)


def loss_of(setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that computes the loss of each sample, (batch,)."""
    if setting.problem == "friedman":
        return lambda outputs, targets: ((outputs - targets) ** 2).mean(1)
    if setting.problem == "transformer":
        return lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none").mean(1)
    return lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none")


def turned(images: Tensor, drawn: torch.Generator) -> Tensor:
    """Rotate, scale and shift images at random."""
    count = len(images)
    angle = (torch.rand(count, generator=drawn) - 0.5) * 1.2
    size = 1 + (torch.rand(count, generator=drawn) - 0.5) * 0.6
    shift = (torch.rand(count, 2, generator=drawn) - 0.5) * 0.5
    rows = torch.stack(
        [angle.cos() * size, -angle.sin() * size, shift[:, 0], angle.sin() * size, angle.cos() * size, shift[:, 1]], 1
    )
    grid = nn.functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def batches(setting: Setting, part: Part, drawn: torch.Generator) -> Iterator[Part]:
    """Yield the batches of one epoch (for the transformer, of the steps between two snapshots)."""
    size = 32 if setting.problem == "transformer" else BATCH
    order = torch.randperm(len(part[0]), generator=drawn)
    if setting.problem == "transformer":
        order = order[: ROUND * size]
    for chosen in order.split(size):
        inputs = part[0][chosen]
        yield (turned(inputs, drawn) if setting.problem in ("augmented", "resnet") else inputs), part[1][chosen]
