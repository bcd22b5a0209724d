"""Constraints on arguments: allowed values, descriptions, errors."""

import math
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from diffusion_lab.constraints import (
    Decay,
    Distinct,
    Length,
    NonEmptyStr,
    NonNegative,
    Number,
    OpenUnit,
    Positive,
    PositiveInt,
    PositiveUnit,
    Range,
    UnitInterval,
    allows,
    annotations,
    checked,
    converted,
    describe,
)
from diffusion_lab.errors import ArgumentError

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "text"),
    [
        (Positive, [1, 0.5, 1e300], [0, -1, NAN, INF, True, "1", None], "a number > 0"),
        (NonNegative, [0, 0.0, 2], [-1e-9, INF], "a number >= 0"),
        (Number, [-3, 0.5], [NAN, -INF, "x"], "a number"),
        (UnitInterval, [0, 1, 0.5], [-0.1, 1.1], "a number in [0, 1]"),
        (OpenUnit, [0.5], [0, 1], "a number in (0, 1)"),
        (PositiveUnit, [1, 1e-9], [0, 2], "a number in (0, 1]"),
        (Decay, [0, 0.999], [1], "a number in [0, 1)"),
        (PositiveInt, [1, 10**9], [0, 1.0, True], "an integer >= 1"),
        (PositiveInt | None, [None, 3], [0, "null"], "null or an integer >= 1"),
        (Annotated[float, Range(0, infinite=True)], [INF, 0], [-INF, NAN],
         "a number >= 0, or .inf"),
        (Annotated[float, Range(high=3)], [3, -9], [3.1], "a number <= 3"),
        (bool, [True, False], [0, 1, "true", None], "true or false"),
        (str, ["", "a"], [1, None], "a string"),
        (NonEmptyStr, ["a"], [""], "a non-empty string"),
        (Literal["a", "b"], ["a"], ["c", 1], "one of a, b"),
        (Literal[False, True, "all"], [True, "all"], [1, 0], "one of false, true, all"),
        (PositiveInt | Literal["auto"], ["auto", 2], ["x", 0], "an integer >= 1 or auto"),
        (Sequence[PositiveInt], [[], [1], (2, 3)], [[0], "12", 3], "a list, each an integer >= 1"),
        (Annotated[list[Decay], Length(2, 2)], [[0, 0.5]], [[0], [0, 0, 0], [0, 1]],
         "a list of 2, each a number in [0, 1)"),
        (Annotated[list[float], Length(1), Distinct()], [[1.0]], [[], [1.0, 1.0]],
         "a list of different values of at least 1, each a number"),
        (Mapping[str, Positive], [{"a": 1}, {}], [{"a": 0}, 3],
         "a mapping, each value a number > 0"),
        (Any, [1, "x", None], [], ""),
    ],
)  # fmt: skip
def test_values_and_descriptions(annotation: Any, good: list, bad: list, text: str) -> None:
    assert all(allows(annotation, value) for value in good)
    assert not any(allows(annotation, value) for value in bad)
    assert describe(annotation) == text


def test_numpy_floats_are_numbers() -> None:
    assert allows(Positive, np.float64(0.5))


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Positive, 2, 2.0),
        (float | None, 1, 1.0),
        (Literal["auto"] | Positive | None, 3, 3.0),
        (Annotated[list[Decay], Length(2, 2)], [0, 0.5], [0.0, 0.5]),
        (tuple[float, float], (1, 2), (1.0, 2.0)),
        (Mapping[str, list[float]], {"a": [1]}, {"a": [1.0]}),
        (bool | Positive, True, True),
        (PositiveInt | Positive, 2, 2),
        (PositiveInt | Positive, 2.5, 2.5),
        (PositiveInt, 2, 2),
        (str, "1", "1"),
        (Any, 1, 1),
        (None | float, None, None),
    ],
)
def test_integers_are_converted_where_floats_are_annotated(
    annotation: Any, value: Any, expected: Any
) -> None:
    result = converted(annotation, value)
    assert repr(result) == repr(expected)


def test_integer_beyond_the_largest_float_is_refused() -> None:
    assert not allows(Positive, 10**400) and not allows(Number, -(10**400))
    assert not allows(PositiveInt, 10**400)


def test_checked_constructor_receives_floats() -> None:
    assert repr(Example(2).a) == "2.0" and repr(Example(2.5).a) == "2.5"
    assert Example(a=2).kind == "x" and repr(Example(a=2).a) == "2.0"


class Example:
    @checked
    def __init__(self, a: Positive, *, kind: Literal["x", "y"] = "x", other: Any = None) -> None:
        self.a, self.kind = a, kind


def test_checked_constructor_names_argument_and_allowed_values() -> None:
    assert Example(2).a == 2 and Example(a=1, kind="y").kind == "y"
    with pytest.raises(ArgumentError, match=r"^a=0 is not allowed; it must be a number > 0$"):
        Example(0)
    with pytest.raises(ArgumentError, match=r"^kind=z is not allowed; it must be one of x, y$"):
        Example(1, kind="z")
    with pytest.raises(ArgumentError, match=r"^a=null is not allowed"):
        Example(None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Example(1, unknown=2)


def test_error_is_a_value_error_with_name_and_value() -> None:
    with pytest.raises(ValueError) as caught:
        Example(-1)
    assert (caught.value.name, caught.value.value) == ("a", -1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_annotations_of_functions_classes_and_partials() -> None:
    assert annotations(Example)["a"] == Positive
    assert "self" not in annotations(Example)

    def function(x: PositiveInt, *rest: int, **more: int) -> int:
        return x

    assert dict(annotations(function)) == {"x": PositiveInt}
    assert annotations(partial(function)) == {}


def test_error_of_a_large_integer_is_the_same_after_pickling() -> None:
    error = ArgumentError("seed", 2**63, "an integer >= 0")
    assert str(error).count("63 bits") == 1
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
