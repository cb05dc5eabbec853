"""Bad and unusual values, by kind of argument, for the tests of bad input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

NAN, INF, F64 = math.nan, math.inf, torch.float64


class Case(NamedTuple):
    """A value, made from the base call's value, and the expected outcome.

    Rules: "refuse", an error that names the argument; "equal", the base call's result; "either", one of these two;
    "survive", an error that names the argument or a finite result.
    """

    label: str
    rule: str
    make: Callable[[Any], Any]


def refuse(*tables: Mapping[str, Any], **values: Any) -> list[Case]:
    values = {label: value for table in (*tables, values) for label, value in table.items()}
    return [Case(label, "refuse", lambda _, value=value: value) for label, value in values.items()]


def made(rule: str, **makes: Any) -> list[Case]:
    """Make cases from functions of the base call's value, or from values."""
    return [Case(key, rule, make if inspect.isroutine(make) or isinstance(make, type) else lambda _, value=make: value)
            for key, make in makes.items()]  # fmt: skip


# base calls use integers and powers of two, so that no dtype rounds them
# fmt: off
ODD = {"str": "abc", "digits": "3", "nothing": "", "bytes": b"3", "dict": {}, "set": {1}, "object": object(),
    "type": int,
       "function": len, "ellipsis": ..., "date": np.datetime64("2020-01-01"), "none": None, "strings": np.array(["a"])}
LISTS = {"list": [1], "tuple": (1, 2), "array": np.ones(2), "one": np.ones(1), "tensor": torch.ones(2)}
EMPTY = {"empty_list": [], "empty": np.zeros(0), "none_list": [None]}
BOOLS = {"true": True, "false": False, "np_true": np.True_, "tensor_true": torch.tensor(True)}
WILD = {"nan": NAN, "inf": INF, "minus_inf": -INF, "np_nan": np.float64(NAN), "tensor_nan": torch.tensor(NAN),
        "complex": 1 + 2j, "np_complex": np.complex128(1j), "masked_number": np.ma.masked}
ANY = {**ODD, **LISTS, **EMPTY, **BOOLS, **WILD}
THING = refuse(ANY, three=3, objects=[object()], named={"a": 1}, state={"a": torch.ones(1)}, module_class=nn.Linear)


def but(cases: list[Case], *labels: str) -> list[Case]:
    return [case for case in cases if case.label not in labels]


def count(least: int) -> list[Case]:
    below = {"below": least - 1, "minus": -1, "np_minus": np.int64(-5), "minus_huge": -(10**30)}
    return [*refuse(ANY, below, fraction=2.5, np_fraction=np.float32(2.5), float_huge=1e300),
            *made("equal", int64=np.int64, int32=np.int32, uint8=np.uint8, big=lambda v: np.array(v, ">i4")[()]),
            *made("either", zero_d=np.array, zero_tensor=torch.tensor, float64=np.float64, ratio=Fraction),
            *made("survive", billion=10**9, word=2**63 - 1, astronomic=10**30)]


def number(low: float = -INF, high: float = INF, closed: str = "") -> list[Case]:
    """A number between ``low`` and ``high``; ``closed`` lists the ends that are included: "[" and "]"."""
    ends = {"low": low, "int_low": int(low)} if low > -INF and "[" not in closed else {}
    ends |= {"below": low - 1, "tiny_below": np.nextafter(low, -INF), "minus_huge": -1e300} if low > -INF else {}
    ends |= {"above": high + 1, "far_above": 1e300, **({} if "]" in closed else {"high": high})} if high < INF else {}
    large = {"huge": 1e300, "int_huge": 10**9} if high == INF else {}
    return [*refuse(ANY, ends, beyond_float=10**400),
            *made("equal", float64=np.float64, float32=np.float32, float16=np.float16, big=lambda v: np.array(v,
                ">f8")[()]),
            *made("either", zero_d=np.array, zero_tensor=torch.tensor, ratio=Fraction, decimal=Decimal),
            *made("survive", small=max(low, 0) + 1e-300, **large)]


def spoiled(value: Any) -> Callable[[Any], Any]:
    """Return a function that puts a value into the middle of a copy of an array."""
    def make(base: Any) -> Any:
        kind = object if value is None else np.result_type(type(value), np.float64)
        changed = np.array(base.numpy() if isinstance(base, torch.Tensor) else base, dtype=kind)
        changed.flat[changed.size // 2] = value
        return torch.from_numpy(changed) if isinstance(base, torch.Tensor) else changed
    return make


def masked(base: Any) -> Any:
    return np.ma.array(spoiled(99.0)(base), mask=np.arange(np.size(base)).reshape(np.shape(base)) == np.size(base) // 2)


def tensor(base: Any, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.as_tensor(base if isinstance(base, torch.Tensor) else np.array(base), dtype=dtype).clone()


def negative_bit(base: Any) -> torch.Tensor:
    return torch.complex(torch.zeros_like(tensor(base)), -tensor(base)).conj().imag


def strided(base: Any) -> Any:
    doubled = np.repeat(base.numpy() if isinstance(base, torch.Tensor) else base, 2, axis=-1)
    return (torch.from_numpy(doubled) if isinstance(base, torch.Tensor) else doubled)[..., ::2]


def table(base: Any, index: Any = None) -> Any:
    return (pd.DataFrame if base.ndim == 2 else pd.Series)(base, index=index)


BAD_NUMBERS = {"with_nan": spoiled(NAN), "with_inf": spoiled(INF), "with_minus_inf": spoiled(-INF)}
EMPTIED = {"empty_rows": lambda v: v[:0], "no_columns": lambda v: v[..., :0], "deep": lambda v: v[None, None, None]}
LENGTHS = {"fewer": lambda v: v[:-1], "more": lambda v: np.concatenate([v, v[-1:]])}
ARRAY = [  # real, finite array of a given shape, NumPy or PyTorch
    *refuse(ANY, three=3, dates=np.zeros(12, "M8[s]"), ragged=[[1, 2], [3]]),
    *made("refuse", **BAD_NUMBERS, **EMPTIED, **LENGTHS, with_none=spoiled(None), with_complex=spoiled(2j),
        masked=masked,
          complex=lambda v: v.astype(complex), complex64=lambda v: v.astype("c8") * 1j,
              complex_tensor=lambda v: tensor(v) * 1j,
          words=lambda v: v.astype(str), word_objects=lambda v: v.astype(str).astype(object),
              meta=lambda v: tensor(v).to("meta"),
          fields=lambda v: np.zeros(len(v), "f8,f8"), negative=spoiled(-3.0)),
    *made("equal", list=lambda v: v.tolist(), int_list=lambda v: v.astype(int).tolist(), fortran=np.asfortranarray,
        strided=strided,
          backwards=lambda v: v[::-1].copy()[::-1], mirrored=lambda v: v[..., ::-1].copy()[..., ::-1], table=table,
          odd_table=lambda v: table(v, range(len(v), 0, -1)), big=lambda v: v.astype(">f8"),
              big32=lambda v: v.astype(">f4"),
          float32=lambda v: v.astype(np.float32), read_only=lambda v: np.frombuffer(v.tobytes()).reshape(v.shape),
          int64=lambda v: v.astype(int), int16=lambda v: v.astype(np.int16), big_int=lambda v: v.astype(">i8"),
              tensor64=tensor,
          tensor32=lambda v: tensor(v, torch.float32), grad=lambda v: tensor(v).requires_grad_(),
              parameter=lambda v: nn.Parameter(tensor(v)),
          tensor_int=lambda v: tensor(v, torch.int32), tensor_strided=lambda v: strided(tensor(v)),
              negative_bit=negative_bit),
    *made("either", float16=lambda v: v.astype(np.float16), half=lambda v: tensor(v, torch.half),
        sparse=lambda v: tensor(v).to_sparse(),
          bfloat16=lambda v: tensor(v, torch.bfloat16), longdouble=lambda v: v.astype(np.longdouble),
              objects=lambda v: v.astype(object),
          unmasked=lambda v: np.ma.array(v), rows=lambda v: [tensor(row) for row in v]),
    *made("survive", huge=lambda v: v * 1e300, large=lambda v: v * 1e30, tiny=lambda v: v * 1e-300,
        zeros=lambda v: v * 0,
          constant=lambda v: v * 0 + 5, bools=lambda v: v > 3)]
ROWS = but(ARRAY, *LENGTHS, "tuple", "array", "tensor", "one")  # any number of rows
SIGNED, SIGNED_ROWS = but(ARRAY, "negative"), but(ROWS, "negative")
TENSOR = [  # NaN is allowed: automatic mixed precision needs to see it
    *refuse(ANY, three=3, zero_d=torch.tensor(1.0)),
    *made("refuse", **EMPTIED, fewer=LENGTHS["fewer"], complex=lambda v: v + 1j, int64=lambda v: v.long(),
        meta=lambda v: v.to("meta")),
    *made("equal", float64=lambda v: v.double(), strided=strided, negative_bit=negative_bit,
        grad=lambda v: v.clone().requires_grad_()),
    *made("either", half=lambda v: v.half(), bfloat16=lambda v: v.bfloat16(), sparse=lambda v: v.to_sparse(),
        array=lambda v: v.numpy()),
    *made("survive", large=lambda v: v * 1e18, tiny=lambda v: v * 1e-30)]
FLAG = [*refuse(but_bools := {k: v for k, v in ANY.items() if k not in BOOLS}, half=0.5, two=2), *made("equal",
    np_bool=np.bool_),
        *made("either", int=int, zero_d=np.array, zero_tensor=torch.tensor)]
CHOICE = [*refuse(ANY, zero=0, three=3), *made("refuse", upper=lambda v: v.upper(), listed=lambda v: [v],
    array_of=lambda v: np.array([v, v])),
          *made("equal", np_str=np.str_)]
TEXT = [*but(refuse(ANY, three=3), "str", "digits"), *made("equal", np_str=np.str_)]
PATH = [*but(refuse(ANY, three=3, zero_byte="a\0b"), "str", "digits", "bytes", "nothing"), *made("equal", path=Path,
    np_str=np.str_),
        *made("either", bytes=str.encode)]
PATTERNS = [*but(refuse(ANY, three=3, ints=[1], mixed=["0*", 3], nested=[["0*"]], byte_list=[b"0*"], unknown="nope",
    out="!*", some=["0*", "nope"]), "str"),
            *made("equal", tuple=lambda v: (v,), listed=lambda v: [v], np_str=np.str_, array=lambda v: np.array([v]))]
LATE = but(PATTERNS, "digits", "strings", "nothing", "unknown", "out", "some", "empty_list",
    "empty")  # what they match is known only during a run
FUNCTION = [*but(THING, "type", "function", "module_class"), *refuse(no_argument=lambda: 1)]
SCHEME = but(CHOICE, "type", "function")
WHOLE = [*but(refuse(ANY, fractions=[0.5], nans=[NAN], bools=[True, False], mask=np.ma.array([1, 2], mask=[1, 0]),
    beyond=[10**30]), *LISTS),
         *made("equal", array=np.array, int32=np.int32, tensor=torch.tensor, big=lambda v: np.array(v, ">i8"),
             tuple=tuple),
         *made("survive", billion=[10**9], before=[-1], far_before=[-(10**9)])]
MASK = [*refuse(ANY, indices=[0, 1, 2], floats=np.ones(3), ints=torch.ones(3, dtype=int), two_d=np.ones((1, 3), bool),
    fewer=[True, True], nans=[NAN] * 3,
                words=["True"] * 3, mask=np.ma.array(np.ones(3, bool), mask=[1, 0, 0])), *made("equal",
                    listed=lambda v: v.tolist(), tensors=torch.tensor, strided=strided)]
SCALES = [*but(refuse(ANY, minus=-1, falls=[4, 2], nan_list=[NAN], words=["4"], deep=[[4]], bools=[True],
    complexes=[1j], mask=np.ma.array([4.0], mask=[1]), beyond=10**400), *LISTS),
          *made("equal", int64=np.int64, float32=np.float32, listed=lambda v: [v], array=lambda v: np.array([v])),
              *made("either", zero_d=np.array, ratio=Fraction),
          *made("survive", huge=1e300, billion=10**9, zero=0)]
RISING = [*refuse(but_bools, rises=[2, 4], zero=[0.0], infinite=[INF, 1.0], words=["4"], bools=[True],
    mask=np.ma.array([4.0], mask=[1])),
          *made("equal", array=np.array, tuple=tuple, float32=np.float32, big=lambda v: np.array(v, ">f8")),
              *made("either", grad=lambda v: torch.tensor(v, requires_grad=True))]
SCALED = but(RISING, "list", "one", "array")
DOMAIN = [*refuse(ANY, reversed=(16, 0), flat=(1, 1), nan_end=(NAN, 1), inf_end=(0, INF), one_end=(0,), words=("0",
    "1"), bools=(False, True), three=(0, 1, 2),
                  complexes=(0j, 1j), two=((0, 64), (0, 64)), beyond=(0, 10**400), nones=(None, None)),
                      *made("survive", wide=(-1e300, 1e300)),
          *made("equal", listed=list, pair=lambda v: [v], array_of=np.array, tensor_of=torch.tensor,
              float32=lambda v: tuple(map(np.float32, v)))]
NORM = [*refuse(ANY, zero=0, three=3, half=1.5, beyond=10**400), *made("equal", int64=np.int64), *made("either",
    float=float)]


def mapping(**wrong: Any) -> list[Case]:
    """A mapping from names; ``wrong`` are invalid values for its entries."""
    spoil = {f"value_{key}": lambda base, value=value: {**base, next(iter(base)): value} for key,
        value in wrong.items()}
    return [*but(refuse(ANY, three=3), "dict"), *made("refuse", **spoil)]


NO_TENSOR = {"none": None, "word": "x", "number": 3.0}
NO_SCORE = {**NO_TENSOR, "nan": torch.full((8, 4), NAN), "complex": torch.ones(8, 4) * 1j}


def changed(**wrong: Any) -> list[Case]:
    """A saved state; ``wrong`` are invalid values for its entries."""
    spoil = {f"{key}_{label}": lambda state, key=key, value=value: {**state, key: value} for key,
        values in wrong.items() for label, value in values.items()}
    gone = {f"{key}_gone": lambda state, key=key: {k: v for k, v in state.items() if k != key} for key in wrong}
    return [*refuse(ANY, three=3), *made("refuse", **spoil, **gone)]
# fmt: on
