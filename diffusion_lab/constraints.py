r"""Constraints on arguments, stated once: as annotations of the constructor they belong to.

    class LogNormal(TimestepSampler):
        @checked
        def __init__(self, mean: Number = -1.2, std: Positive = 1.2) -> None: ...

`LogNormal(std=0)` raises `ArgumentError`: "std=0 is not allowed; it must be a number > 0". The
command line reads the same annotations before anything is built, and so does the configuration
reference. Supported are bool, int, float, str, `Literal`, classes, unions, sequences, mappings,
and these types with a `Range`, `Length` or `Distinct` in `Annotated`. Other annotations are not
checked.

Constraints between arguments stand in the body of the constructor, as a `ValueError`.
"""

__all__ = [
    "AtLeastTwo", "Decay", "Distinct", "Length", "Node", "NonEmptyStr", "NonNegative",
    "NonNegativeInt", "Number", "OpenUnit", "Positive", "PositiveInt", "PositiveUnit", "Range",
    "UnitInterval", "allows", "annotations", "check_arguments", "checked", "converted", "describe",
    "unpacked_keywords",
]  # fmt: skip

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

from diffusion_lab.errors import INT_LIMIT, ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Arguments:
        low: The lower bound.
        high: The upper bound.
        low_open: Whether `low` itself is excluded.
        high_open: Whether `high` itself is excluded.
        infinite: Whether +inf is allowed as well.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return self.infinite and value == math.inf
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high < math.inf and self.low > -math.inf:
            left, right = "[("[self.low_open], "])"[self.high_open]
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        if self.low > -math.inf:
            text = f"{'>' if self.low_open else '>='} {self.low:g}"
            return text + ", or .inf" * self.infinite
        if self.high < math.inf:
            return f"{'<' if self.high_open else '<='} {self.high:g}"
        return ""


@dataclass(frozen=True)
class Length:
    """The number of items of a sequence, or of characters of a text.

    Arguments:
        low: The least number.
        high: The largest number; None has no limit.
    """

    low: int
    high: int | None = None


@dataclass(frozen=True)
class Distinct:
    """No item of the sequence occurs twice."""


Number = Annotated[float, Range()]
Positive = Annotated[float, Range(0, low_open=True)]
NonNegative = Annotated[float, Range(0)]
UnitInterval = Annotated[float, Range(0, 1)]
OpenUnit = Annotated[float, Range(0, 1, low_open=True, high_open=True)]
PositiveUnit = Annotated[float, Range(0, 1, low_open=True)]
Decay = Annotated[float, Range(0, 1, high_open=True)]
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
AtLeastTwo = Annotated[int, Range(2)]
NonEmptyStr = Annotated[str, Length(1)]


class Node:
    """Annotation of a configuration key that holds a node with a `_target_`."""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _conditions(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of an annotation, and what `Annotated` adds to it."""
    if get_origin(annotation) is Annotated:
        inner, *conditions = get_args(annotation)
        return inner, tuple(conditions)
    return annotation, ()


def _sequence(kind: Any) -> Any:
    """The type of the items if the annotation is a list, tuple or sequence, otherwise None."""
    if kind in (list, tuple, Sequence):
        return Any
    origin, arguments = get_origin(kind), get_args(kind)
    return arguments[0] if origin in (list, tuple, Sequence) and arguments else None


def allows(annotation: Any, value: Any) -> bool:
    """Whether a value satisfies an annotation.

    Arguments:
        annotation: The annotation of an argument, see the top of this module.
        value: The value; lists and dictionaries as Python's own.
    """
    kind, conditions = _conditions(annotation)
    if kind is Any:
        return True
    if _is_union(kind):
        return any(allows(part, value) for part in get_args(kind))
    if kind is None or kind is type(None):
        return value is None
    if get_origin(kind) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(kind))
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        allowed = int if kind is int else (int, float)
        if not isinstance(value, allowed) or isinstance(value, bool):
            return False
        if isinstance(value, int) and abs(value) >= INT_LIMIT:
            return False
        return all(value in limits for limits in conditions if isinstance(limits, Range))
    if kind is str:
        return isinstance(value, str) and _has_length(value, conditions)
    if kind is Node:
        return isinstance(value, Mapping) and "_target_" in value
    item = _sequence(kind)
    if item is not None:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            return False
        if any(isinstance(c, Distinct) for c in conditions) and len(set(value)) < len(value):
            return False
        return _has_length(value, conditions) and all(allows(item, v) for v in value)
    if get_origin(kind) in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            allows(get_args(kind)[1], v) for v in value.values()
        )
    if kind is not Any and inspect.isclass(kind):  # Any is a class from Python 3.11 on
        return isinstance(value, kind)
    return True


def converted(annotation: Any, value: Any) -> Any:
    """Returns an allowed value with integers as floats, where the annotation asks for floats.

    YAML reads 1 as an integer, of which torch would make an integer tensor.

    Arguments:
        annotation: The annotation of the argument.
        value: A value that it allows.
    """
    kind, _ = _conditions(annotation)
    if _is_union(kind):
        parts = [part for part in get_args(kind) if allows(part, value)]
        exact = any(_conditions(part)[0] is int for part in parts)
        return value if exact or not parts else converted(parts[0], value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    item = _sequence(kind)
    if item is not None and type(value) in (list, tuple):
        return type(value)(converted(item, each) for each in value)
    if get_origin(kind) in (dict, Mapping) and type(value) is dict:
        return {key: converted(get_args(kind)[1], each) for key, each in value.items()}
    return value


def _has_length(value: Sequence[Any], conditions: tuple[Any, ...]) -> bool:
    limits = [c for c in conditions if isinstance(c, Length)]
    return all(c.low <= len(value) <= (math.inf if c.high is None else c.high) for c in limits)


def describe(annotation: Any) -> str:
    """Returns the allowed values in words, to follow "it must be"; empty if nothing is checked."""
    kind, conditions = _conditions(annotation)
    if _is_union(kind):
        parts = get_args(kind)
        # None first, as it is the usual default.
        ordered = sorted(parts, key=lambda part: part is not type(None))
        texts = [describe(part) for part in ordered]
        return "" if "" in texts else " or ".join(dict.fromkeys(texts))
    if kind is Any:
        return ""
    if kind is None or kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        options = [_word(option) for option in get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        limits = " and ".join(str(c) for c in conditions if isinstance(c, Range))
        name = "an integer" if kind is int else "a number"
        return f"{name} {limits}".rstrip()
    if kind is str:
        return "a non-empty string" if conditions else "a string"
    if kind is Node:
        return "a node with a _target_"
    item = _sequence(kind)
    if item is not None:
        return _describe_sequence(item, conditions)
    if get_origin(kind) in (dict, Mapping):
        inner = describe(get_args(kind)[1])
        return f"a mapping, each value {inner}" if inner else "a mapping"
    if get_origin(kind) is Callable:
        return "a node with a _target_"
    if inspect.isclass(kind) and kind is not object and kind is not Any:
        return f"an instance of {kind.__name__}"
    return ""


def _describe_sequence(item: Any, conditions: tuple[Any, ...]) -> str:
    text = "a list"
    if any(isinstance(c, Distinct) for c in conditions):
        text = "a list of different values"
    for limit in conditions:
        if isinstance(limit, Length):
            text += f" of {limit.low}" if limit.low == limit.high else f" of at least {limit.low}"
    inner = describe(item)
    return f"{text}, each {inner}" if inner else text


def _word(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


@functools.cache
def annotations(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the annotations of a function's arguments, or of a class's constructor.

    Empty if they cannot be read. `*args`, `**kwargs` and the return value are not included.
    """
    target = function.__init__ if inspect.isclass(function) else function
    target = inspect.unwrap(target)
    try:
        hints = get_type_hints(target, include_extras=True)
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError, NameError, AttributeError):
        return {}
    single = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: hints[p.name] for p in single if p.name in hints}


def unpacked_keywords(function: Callable[..., Any], name: str) -> list[str] | None:
    """Returns the keywords that `**name: Unpack[SomeTypedDict]` stands for; None if it has none.

    Arguments:
        function: A function or class.
        name: The name of the argument.
    """
    target = function.__init__ if inspect.isclass(function) else function
    hint = get_type_hints(inspect.unwrap(target)).get(name)
    return list(get_args(hint)[0].__annotations__) if get_origin(hint) is Unpack else None


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks arguments against the annotations of a function or a class.

    Arguments:
        function: The function or class that is about to be called.
        arguments: Arguments by name; those without an annotation are not checked.

    Raises:
        ArgumentError: If one is not allowed; names the first.
    """
    hints = annotations(function)
    for name, value in arguments.items():
        if name in hints and not allows(hints[name], value):
            raise ArgumentError(name, value, describe(hints[name]))


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a constructor or function: its arguments are checked at every call.

    Integers arrive as floats where the annotation asks for floats.

    Raises:
        ArgumentError: From the decorated function, if an argument is not allowed.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        check_arguments(function, bound.arguments)
        hints = annotations(function)
        for name, value in bound.arguments.items():
            if name in hints:
                bound.arguments[name] = converted(hints[name], value)
        return function(*bound.args, **bound.kwargs)

    wrapper.__checked__ = True  # type: ignore[attr-defined]
    return wrapper
