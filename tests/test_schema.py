from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from cifarnet.errors import UserError
from cifarnet.schema import Range, check, check_arguments, check_settings, did_you_mean

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (Range(0, 1), [0, 0.5, 1], [-1e-9, 1.1, NAN, INF, -INF], "at least 0 and at most 1"),
        (Range(above=0, most=9), [1e-9, 9], [0, -1, 10, NAN], "above 0 and at most 9"),
        (Range(0, below=1), [0, 0.99], [1, NAN], "at least 0 and below 1"),
        (Range(least=3), [3, 2**62], [2, NAN, INF], "at least 3"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(limits, inside, outside, words):
    for number in inside:
        check("a.b", number, Annotated[float, limits] | None)
    for number in outside:
        with pytest.raises(UserError) as error:
            check("a.b", number, Annotated[float, limits] | None)
        assert str(error.value) == f"a.b={number} is out of range: it must be {words}."


def test_every_number_of_a_list_is_checked():
    hint = Sequence[Annotated[int, Range(1, 9)]] | None
    check("a", [1, 9], hint)
    check("a", None, hint)
    for wrong in ([], [1, 0], (10,)):
        with pytest.raises(UserError, match=r"it must be one or more numbers, each at least 1 and at most 9"):
            check("a", wrong, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float),
        (None, int | None),
        ([1, 2], Sequence[int]),
        ([0.9, 0.99], tuple[float, float]),
        (OmegaConf.create([1, 2]), list[int]),
        ("warn", bool | Literal["warn"] | None),
        (True, Any),
    ],
)
def test_values_of_the_declared_type_are_accepted(value, hint):
    check("a", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "a whole number"),
        (1, bool, "true or false"),
        (1.5, int, "a whole number"),
        ("x", float | None, "a number or null"),
        (3, Sequence[int], "a list like […, …] of whole numbers"),
        ([1, "x"], Sequence[int] | None, "a list like […, …] of whole numbers or null"),
        ("maybe", bool | Literal["warn"], "true, false or warn"),
    ],
)
def test_values_of_another_type_are_refused(value, hint, words):
    with pytest.raises(UserError) as error:
        check("a.b", value, hint)
    assert str(error.value) == f"a.b={value} is not valid: expected {words}."


@pytest.mark.parametrize("value", [NAN, INF, -INF, 2**63, [1.0, NAN]])
def test_numbers_are_finite_and_fit_into_64_bits(value):
    with pytest.raises(UserError, match=r"^a\.b=.* is too large or not finite"):
        check("a.b", value, Any)


class Base:
    def __init__(self, size: Annotated[int, Range(1, 9)], flip: Literal["none", "random"] = "none") -> None: ...


class Derived(Base):
    def __init__(self, *, rate: float = 0.1, **settings: Any) -> None: ...


class Open:
    def __init__(self, **settings: Any) -> None: ...


def test_arguments_are_checked_against_the_signature_of_a_class_and_its_bases():
    check_arguments("data", Derived, {"size": 3, "flip": "random", "rate": 1})
    for arguments, message in [
        ({"size": 10}, r"data\.size=10 is out of range: it must be at least 1 and at most 9"),
        ({"flip": "left"}, r"data\.flip=left .* expected none or random"),
        ({"rate": "fast"}, r"data\.rate=fast .* expected a number"),
        ({"sizes": 3}, r"data\.sizes=3: .*Derived has no argument sizes\. Did you mean size\?"),
        ({"nonsense": 3}, r"Derived has no argument nonsense\. Remove this setting"),
    ]:
        with pytest.raises(UserError, match=message):
            check_arguments("data", Derived, arguments)


def test_any_argument_is_accepted_by_a_class_that_takes_any_name():
    check_arguments("data", Open, {"anything": 3})


def test_arguments_that_hydra_builds_are_not_checked_before():
    check_arguments("data", Base, {"size": OmegaConf.create({"_target_": "builtins.int"})})


@dataclass
class Settings:
    seed: int
    name: str | None


def test_settings_are_checked_against_a_dataclass():
    check_settings({"seed": 1, "other": 2}, Settings)
    with pytest.raises(UserError, match=r"sweep\.seed=x is not valid: expected a whole number"):
        check_settings({"seed": "x"}, Settings, "sweep.")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("lrr", " Did you mean optimizer.lr?"),
        ("optimizer.lrr", " Did you mean optimizer.lr?"),
        ("sead", " Did you mean seed?"),
        ("zzz", ""),
    ],
)
def test_similar_names_are_suggested(key, suggestion):
    assert did_you_mean(key, ["seed", "optimizer.lr", "model.widths"]) == suggestion
