"""Bad and unusual input to every public name: the right result, or an error that names the argument."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")
# isort: off
# fmt: off
from bad_values import (
    ANY, BAD_NUMBERS, BOOLS, CHOICE, DOMAIN, F64, FLAG, FUNCTION, INF, LATE, LISTS, MASK, NAN, NO_SCORE, NO_TENSOR,
    NORM, PATH, PATTERNS, ROWS, SCALED, SCALES, SCHEME, SIGNED, SIGNED_ROWS, TENSOR, TEXT, THING, WHOLE, Case, but,
    changed, count, made, mapping, number, refuse,
)
# fmt: on
# isort: on
from matplotlib.figure import Figure
from torch import nn

import lightning_koopman as lk

SECONDS, BYTES = 5, 2**31

# fmt: off
# -- every argument by its name, or by "callable.argument": a valid value and its kind; None where the signature says so
T, X, POINTS = np.arange(12.0), np.arange(64.0), torch.arange(64.0)
STATES = np.stack([64 + np.round(48 * 0.7**T), np.round(40 * 0.8**T), np.round(30 + 30 * np.cos(T))], axis=1)
Y = np.round(60 + 40 * np.sin(np.pi * X / 8) + 15 * np.cos(np.pi * X / 2))
SPECTRUM, DEPTH = lk.dmd_rrr(STATES), lk.estimate_depth(X, Y)
ROW = {
    "epoch": 6,
    "train_loss": 0.5,
    "phase": "descending",
    "step_length": 0.25,
    "step_correlation": 0.25,
    "step_correlation_error": 0.125,
    "slowing": 0.5,
}
SCORES = {"0.weight": torch.arange(32.0).reshape(8, 4), "2.weight": torch.arange(24.0).reshape(3, 8) + 8}
KEPT = {name: score > 16 for name, score in SCORES.items()}
NETWORK, RECORDED = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), lk.Trajectory(3, dtype=F64)
for row in STATES:
    RECORDED.append(row)
def run(network: Any) -> torch.Tensor:
    return network(torch.ones(2, 4))
READING, COMPARED = lk.read_training(RECORDED), lk.compare_trainings(RECORDED, RECORDED)
LOSSES = but(SIGNED_ROWS, *LISTS, *BAD_NUMBERS, "empty_list", "empty", "empty_rows", "no_columns")  # NaN or empty is ok
with TemporaryDirectory() as folder:
    SAVED = RECORDED.save(f"{folder}/rows")
OWNERS = {"Spectrum": SPECTRUM, "TrainingComparison": COMPARED,
          "Trajectory": RECORDED, "MaskSet": lk.MaskSet(KEPT), "HSVR": lk.HSVR(2).fit(X[:,
    None], Y),
          "SobolevLoss": lk.SobolevLoss(4, domain=(0, 64), n_samples=128),
          "ChannelRemoval": lk.remove_channels(copy.deepcopy(NETWORK), run, sparsity=0.5)}
SHORT, UNLIKE = lk.MaskSet({k: v[:1] for k, v in KEPT.items()}), lk.MaskSet({"x": torch.ones(3) > 0})
FIELDS = {"gram": {"none": None, "nan": torch.full((12, 12), NAN)}, "dtype": {"word": "nope"}, "marks": {"three": 3},
          "capacity": {"word": "x"}, "first": {"word": "x", "minus": -1}, "sketch": {"minus": -3},
              "total": {"none": None}}
BITS = {"names": {"none": None, "one": ["a"]}, "bits": {"fewer": torch.zeros(1, dtype=torch.uint8), "word": "x"},
        "shapes": {"word": [["x"], [1]], "minus": [[-1], [2]], "huge": [[10**12], [1]]}}
HISTORY = [*THING, *refuse(gone=[{"epoch": 1}], words=[{**ROW, "train_loss": "x"}], nones=[{**ROW, "epoch": None}])]
WIDTHS = [*but(refuse(ANY, minus=[-1], zeros=[0], flags=[True], words=["8"], deep=[[8]]), *LISTS),
          *made("equal", array=np.array, tuple=tuple), *made("survive", billion=[10**10])]
MONITORS = ("KoopmanSpectrumMonitor", "EarlyStopOnUnitEigenvalues", "KoopmanPruner", "KoopmanWeightAveraging",
            "ReduceLROnNoiseFloor")


def each(kind: list[Case], /, **values: Any) -> dict[str, tuple[Any, list[Case]]]:
    """Return arguments of one kind, each with its valid value."""
    return {name.replace("__", "."): (value, kind) for name, value in values.items()}


ARGUMENTS = {
    **each(count(1), n=50, n_layers=3, delays=2, max_rank=2, steps=3, n_outputs=2, every_n_steps=2, every_n_epochs=2,
        patience=2, rank=2,
           rounds=2, check_epoch=5, epoch=40, last=8, Trajectory__n=3, Trajectory__load__n=3),
    **each(but(count(1), "list", "tuple"), averaged_weights__length=2, KoopmanWeightAveraging__length=2),
    **each(count(0), seed=3, min_epochs=3, max_restarts=2, start=1), **each(count(2), capacity=4, sketch=7),
    **each(count(3), window=20, round_epochs=4), **each(count(4), n_batches=8), **each(count(6), horizon=8),
    **each(but(WHOLE, "empty_list", "empty"), groups=[0, 1]),
    **each([*but(count(0), "billion", "word", "astronomic"), *refuse(beyond=9)], first=0, second=1),
    **each(but(count(0), "true", "false", "np_true"), log_figure=4), **each(but(count(0), *BOOLS), verbose=0),
    **each(number(0), radius=0.25, max_residual=16.0, start_norm=8.0, tolerance=0.125, settled_change=0.25,
        baseline_loss=1.5, min_lr=0.125, power=1.0, scale=2.0,
           chance_loss=1.5, max_frequency=2.0, highest=64.0, C=4.0, cache_size=64.0, samples_per_scale=32.0,
           KoopmanPruner__threshold=0.25, MaskSet__from_scores__threshold=8.0),
    **each(but(number(0), "small"), HSVR__tol=2.0**-10, Spectrum__slowest_modulus__max_residual=16.0),
         # with a tiny tol, libsvm never returns
    **each(number(0, 1, "["), tol=2.0**-10), **each(number(0, 1, "]"), fraction=0.5), **each(number(1), decay=2.0),
    **each(number(), exponent=-0.25), **each(number(0, INF, "["), epsilon=0.125), **each(number(0, 64, "]"),
        lowest=4.0),
    **each(number(0, 1), sparsity=0.5, threshold=0.25, factor=0.5, level=0.25),
    **each(but(number(1, INF, "["), "inf"), n_samples=128.0),
    **each([*but(number(), "complex", "np_complex"), *made("equal", complex=complex, complex64=np.complex64)],
        point=0.5),
    **each(FLAG, refine=True, clip=True, taper=False, literal=False, allow_empty=True, structured=False),
    **each(CHOICE, profile="ramp", rule="paper", storage="disk", method="fft", scope="global", mode="report",
        survivors="reinit", dtype="float32", restore="last", by="steps"),
    **each(SCHEME, scheme="he", kind="geometric"), **each(but(TEXT, "nothing"), title="a"), **each(TEXT,
        name="0.weight"),
    **each([*THING, *refuse(half=torch.half, numpy=np.float32, word="float32")], Trajectory__dtype=torch.float32),
    **each(TEXT, observable="train_loss", KoopmanSpectrumMonitor__observable="weights"),
    **each([*TEXT, *refuse(up="../a", root="/a")], prefix="own"),
    **each(PATH, path="rows", Trajectory__path=".", dirpath="runs", folder="."),
    **each(PATTERNS, patterns="0.w*", parameters="0.w*", layers="0.w*", SobolevLoss__layers="1"),
    **each(LATE, modules="0", **dict.fromkeys((f"{name}__parameters" for name in MONITORS), "0.w*")),
    **each(SIGNED, x=X, y=Y, X=X[:, None], snapshot=STATES[1], snapshots=STATES), **each(ROWS, step_norms=STATES[:, 0]),
    **each(SIGNED_ROWS, dmd_rrr__snapshots=STATES, HSVR__predict__X=X[:, None], HSVR__staged_predict__X=X[:, None]),
    **each([*but(SIGNED_ROWS, "empty_rows"), *made("refuse", short=lambda v: v[..., :-1])],
        Trajectory__combine__weights=STATES.T),
    **each(TENSOR, outputs=POINTS.remainder(5)[:, None], targets=POINTS.remainder(3)[:, None], hidden=POINTS[:,
        None].repeat(1, 8)),
    **each([*TENSOR, *made("refuse", **BAD_NUMBERS)], points=POINTS),
    **each([*but(TENSOR, "int64"), *made("refuse", **BAD_NUMBERS)], weights=torch.full((64,), 1 / 128)),
    **each(but(WHOLE, "empty_list", "empty"), times=[3, 12]), **each(MASK, modes=np.ones(3, bool)),
    **each([*WHOLE, *refuse(fewer=[0], more=[0, 1, 2])], offsets=[0, 2]), **each(SCALES, scales=4), **each(SCALED,
        HSVR__scales=[16.0, 4.0]),
    **each(WIDTHS, widths=[8]), **each(DOMAIN, domain=(0, 64)), **each(NORM, norm=1),
    **each(THING, module=NETWORK, network=NETWORK, example=torch.ones(2, 4), trajectory=RECORDED, spectrum=SPECTRUM,
        surrogate=SPECTRUM,
           depth=DEPTH, estimate=DEPTH, within=lk.MaskSet(KEPT), shards=None, values=SCORES["0.weight"],
           Trajectory__record__snapshot=[torch.ones(2), torch.ones(1)],
               MaskSet__pin__optimizers=torch.optim.SGD(NETWORK.parameters(), 0.1)),
    **each(THING, reading=READING, before=READING, ax=Figure().subplots(), runs=RECORDED, comparison=COMPARED),
    **each([*but(THING, "list"), *refuse(fewer=["a"])], names=["a", "b"]),
    **each(LOSSES, losses=np.arange(12.0, 0.0, -1.0)),
    **each([*but(count(0), "huge"), *refuse(beyond=9)], code=2),
    **each([*THING, *refuse(unlike=UNLIKE, short=SHORT)], other=lk.MaskSet(KEPT)),
    **each(but(THING, "empty_list", "empty", "nothing", "dict"), optimizers=[]),
    **each(FUNCTION, all_sum=None, read=None, on_error=None, run=run, copy=copy.deepcopy,
        loss=lambda weights: float(weights.sum())),
    **each([*HISTORY, *made("equal", tuples=tuple)], history=[ROW, ROW]),
    **each(mapping(**NO_TENSOR, deep=torch.ones(1, 1, 1)), state_dict=NETWORK.state_dict()),
    **each(mapping(**NO_TENSOR), changes={"0": {"out_features": (8, 4)}}),
    **each(mapping(none=None, word="x", minus=-1, half=2.5), originals={"0": 8}),
    **each([*mapping(**NO_SCORE), *refuse(int_key={3: KEPT["0.weight"]})], masks=KEPT),
    **each([*mapping(**NO_SCORE), *made("equal", ints=lambda s: {k: v.int() for k, v in s.items()},
            grad=lambda s: {k: v.clone().requires_grad_() for k, v in s.items()})], scores=SCORES),
    **each(changed(**FIELDS), state=SAVED),
    **each(changed(**BITS), MaskSet__from_state_dict__state=lk.MaskSet(KEPT).state_dict()),
}
# fmt: on
# -- calls: all that is public, with all arguments; some exclude each other, some objects are judged by what they do

EXCLUDED = {  # besides Lightning's hooks and what fails only in a run: unmatched patterns, metrics not logged
    "DepthEstimate": "made by estimate_depth", "MLPSuggestion": "made by suggest_mlp", "Spectrum": "made by dmd_rrr",
    "ChannelRemoval": "made by remove_channels", "AveragedWeights": "made by averaged_weights",
    "TrainingComparison": "made by compare_trainings",
    "Phase": "an enumeration",
    "TrainingReading": "made by read_training", "KoopmanWarning": "a category", "StoppingReason": "an enumeration",
    "HSVR.set_score_request": "scikit-learn's own",
}  # fmt: skip
APART: dict[str, list[dict[str, Any]]] = {  # further calls; the first call leaves out these arguments
    "Trajectory": [{"sketch": 7, "storage": "sketch", "n": 3}], "HSVR": [{"scales": [16.0, 4.0]}],
    "SobolevLoss": [{"widths": [8], "scales": 4}, {"n_outputs": 2, "widths": [8], "scales": 4}],
        "SobolevLoss.forward": [{"hidden": POINTS[:, None].repeat(1, 8)}],
    "sobolev_scales": [{"start": 1, "kind": "exponential", "n_layers": 4}],
        "KoopmanSpectrumMonitor": [{"every_n_epochs": 2}], "KoopmanWeightAveraging": [{"every_n_epochs": 2}],
        "ReduceLROnNoiseFloor": [{"every_n_epochs": 2}],
    "export_network": [{"example": torch.ones(2, 4), "network": NETWORK, "path": "net.onnx"}],
        "KoopmanPruner": [{"threshold": 0.25}],
    "MaskSet.from_scores": [{"threshold": 8.0, "scores": SCORES, "allow_empty": True}],
    **{name: [{"chance_loss": 1.5}] for name in ("EarlyStopOnUnitEigenvalues", "RestartOnBadInitialization")},
}  # fmt: skip


def sobolev(**options: Any) -> Any:
    torch.manual_seed(0)
    loss, width = lk.SobolevLoss(**options), len(options.get("widths") or [])
    network, several = options.get("network"), int(options.get("n_outputs", 1))
    outputs = network(torch.ones(64, 4)) if network else ARGUMENTS["outputs"][0].repeat(1, several)
    return loss(outputs, outputs * 0, POINTS, hidden=[ARGUMENTS["hidden"][0]] * width or None)


def forward(**given: Any) -> Any:
    torch.manual_seed(0)
    loss = lk.SobolevLoss(4, domain=(0, 64), widths=[8]) if "hidden" in given else OWNERS["SobolevLoss"]
    data = {"outputs": ARGUMENTS["outputs"][0], "targets": ARGUMENTS["targets"][0], "points": POINTS}
    return loss(**{**data, **given, "hidden": [given["hidden"]] if "hidden" in given else None})


def recorded(**given: Any) -> Any:
    trajectory = lk.Trajectory(3, storage="sketch", sketch=5)
    return trajectory.record(**given), trajectory


HOW: dict[str, Callable[..., Any]] = {
    "HSVR": lambda **given: lk.HSVR(**given).fit(X[:, None], Y), "SobolevLoss": sobolev, "SobolevLoss.forward": forward,
    "HSVR.staged_predict": lambda X: list(OWNERS["HSVR"].staged_predict(X)), "Trajectory.record": recorded,  # noqa: N803
    "compare_trainings": lambda runs, **given: lk.compare_trainings(RECORDED, runs, **given),
    "Trajectory.save": lambda path: list(RECORDED.save(path)),
    "MaskSet.pin": lambda module, optimizers, on_error: lk.MaskSet(KEPT).pin(module, optimizers,
        on_error=on_error).remove(),
}  # fmt: skip


def public(name: str) -> Any:
    owner, _, method = name.partition(".")
    return getattr(getattr(lk, owner), method) if method else getattr(lk, owner)


def names() -> Iterator[str]:
    """Yield all public callables, methods of classes included."""
    for name in lk.__all__:
        own = vars(public(name)) if inspect.isclass(public(name)) and not hasattr(public(name), "on_fit_start") else ()
        methods = {f"{name}.{key}" for key in own if key[0] != "_" and callable(getattr(public(name), key))}
        yield from {name, *methods} - set(EXCLUDED)


def about(name: str, argument: str) -> tuple[Any, list[Case]]:
    value, kind = ARGUMENTS.get(f"{name}.{argument}") or ARGUMENTS[argument]
    optional = "None" in str(inspect.signature(public(name)).parameters[argument].annotation) or argument == "example"
    return value, but(kind, "none") if optional else kind


def bases(name: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments of valid calls."""
    apart = APART.get(name, [])
    alone = {next(iter(each)) for each in apart}
    known = [key for key in inspect.signature(public(name)).parameters if key not in ("self", *alone)]
    yield from ({key: about(name, key)[0] for key in known}, *apart)


TESTED = [(name, argument, base) for name in sorted(names()) for base in bases(name) for argument in base]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit the time and the memory of the block."""

    class TooLongError(BaseException):  # not caught by `except Exception`
        pass

    def end(*_: Any) -> None:
        raise TooLongError(f"more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def plain(value: Any, seen: tuple[int, ...] = ()) -> list[Any]:
    """Flatten a result into a list of arrays and strings."""
    inside = (*seen, id(value))
    if isinstance(value, lk.Spectrum):
        return [value.eigenvalues, value.residuals]
    if isinstance(value, lk.Trajectory):
        return [value.storage, str(value.dtype), value.factor() if len(value) else value.n, value.nbytes]
    if isinstance(value, (lk.HSVR, Figure)):
        return [value.predict(X[:, None])] if isinstance(value, lk.HSVR) else [a.dataLim.bounds for a in value.axes]
    if isinstance(value, torch.Tensor):
        return [value.detach().to(torch.complex128 if value.is_complex() else F64).numpy()]
    if isinstance(value, (np.ndarray, np.generic, int, float, complex)):
        return [np.asarray(value)]
    if isinstance(value, (Mapping, nn.Module)):
        items = value.state_dict() if isinstance(value, nn.Module) else value
        return [each for key, part in items.items() for each in (str(key), *plain(part, inside))]
    if isinstance(value, (list, tuple)):
        return [each for part in value for each in plain(part, inside)]
    if type(value).__module__.startswith("lightning_koopman") and hasattr(value, "__dict__") and id(value) not in seen:
        return plain(vars(value), inside)
    return [str(value) if isinstance(value, (str, Path, type(None))) else type(value).__name__]


def alike(found: list[Any], wanted: list[Any], rounding: float) -> bool:
    return len(found) == len(wanted) and all(
        np.shape(one) == np.shape(two) and np.allclose(one, two, rounding, rounding, equal_nan=True)
        if isinstance(one, np.ndarray) and isinstance(two,
            np.ndarray) and two.dtype.kind in "biufc" else str(one) == str(two)
        for one, two in zip(found, wanted, strict=True)
    )  # fmt: skip


def unfinite(found: list[Any]) -> int:
    arrays = [each for each in found if isinstance(each, np.ndarray) and each.dtype.kind in "fc"]
    return sum(int((~np.isfinite(each)).sum()) for each in arrays)


def called(name: str, given: dict[str, Any]) -> list[Any]:
    owner, function = None, HOW.get(name, public(name))
    if name not in HOW and "." in name and not inspect.ismethod(function):
        owner = copy.deepcopy(OWNERS[name.partition(".")[0]])
        function = getattr(owner, name.partition(".")[2])
    with bounded():
        return plain([function(**given), given.get("module"), owner])


def judge(name: str, argument: str, base: dict[str, Any], case: Case) -> str | None:
    """Return what is wrong with the outcome, or None."""
    given, wanted = copy.deepcopy(base), copy.deepcopy(base)
    given[argument] = case.make(given[argument])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = called(name, given)
        except BaseException as error:
            frames = [(each.filename.rpartition("/lightning_koopman/"), each.lineno)
                      for each in traceback.extract_tb(error.__traceback__)]  # fmt: skip
            at = "".join([f" at {path}:{line}" for (_, package, path), line in frames if package][-1:])
            text = f"{type(error).__name__}: {str(error)[:150]!r}{at}"
            if type(error).__name__ == "TooLongError" or not isinstance(error, Exception):
                return f"HANG: {text}"
            if case.rule == "equal":
                return f"REFUSED VALID: {text}"
            if not isinstance(error, (ValueError, TypeError, ModuleNotFoundError)) or isinstance(
                error, np.linalg.LinAlgError
            ):
                return f"OTHER ERROR: {text}"
            return None if re.search(rf"(?<![A-Za-z_]){argument}(?![A-Za-z_])", str(error)) else f"NO NAME: {text}"
        if case.rule == "refuse":
            return f"ACCEPTED: {str(found)[:150]}"
        wanted = called(name, wanted)
    rounding = 1e-2 if case.label in ("half", "bfloat16", "float16") and case.rule == "either" else 1e-5
    if case.rule != "survive" and not alike(found, wanted, rounding):
        return f"OTHER RESULT: {str(found)[:120]} in place of {str(wanted)[:120]}"
    ours = any(issubclass(each.category, UserWarning) for each in told)
    return f"NOT FINITE: {str(found)[:150]}" if unfinite(found) > unfinite(wanted) and not ours else None


@pytest.mark.parametrize(("name", "argument", "base"), TESTED)
def test_bad_and_unusual_input(name, argument, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [(case.label, judge(name, argument, base, case)) for case in about(name, argument)[1]]
    assert not [f"{label}: {problem}" for label, problem in found if problem]


@pytest.mark.parametrize(
    "name", [name for name in vars(lk.Trajectory) if name in ("factor", "spectrum", "start_norm", "last")]
)
def test_an_empty_trajectory_says_so(name):
    with pytest.raises((ValueError, IndexError), match=r"trajectory|snapshots"):
        getattr(lk.Trajectory(3), name)()
