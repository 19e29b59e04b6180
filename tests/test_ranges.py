from collections.abc import Sequence
from typing import Annotated

import pytest

from cifarnet.config import Range, check
from cifarnet.data import ImageDataModule, ImageFolder, Synthetic
from cifarnet.errors import UserError
from cifarnet.recipes.mixup import Mixup

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (Range(0, 1), [0, 0.5, 1, True], [-1e-9, 1.1, NAN, INF, -INF], "from 0 to 1"),
        (Range(above=0, most=9), [1e-9, 9], [0, -1, 10, NAN], "above 0 to 9"),
        (Range(0, below=1), [0, 0.99], [1, NAN], "from 0 and below 1"),
        (Range(least=3), [3, 10**30], [2, NAN, INF], "from 3"),
    ],
    ids=str,
)
def test_ranges(limits, inside, outside, words):
    for number in inside:
        check("a.b", number, Annotated[float, limits] | None)
    for number in outside:
        with pytest.raises(UserError) as error:
            check("a.b", number, Annotated[float, limits] | None)
        assert str(error.value) == f"a.b={number}: give a number {words}."


def test_lists_and_what_is_no_number():
    several = Sequence[Annotated[int, Range(1, 9)]] | None
    check("a", [1, 9], several)
    check("a", None, several)
    check("a", "text", Annotated[str, Range(1, 9)])  # its type is checked elsewhere
    for wrong in ([], [1, 0], (10,)):
        with pytest.raises(UserError, match=r"^a=\[.*\]: give one or more numbers, each from 1 to 9\.$"):
            check("a", wrong, several)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (ImageDataModule, {"batch_size": [0, -1, 10**9], "eval_batch_size": [0, 10**9]}),
        (ImageDataModule, {"val_fraction": [NAN, -0.1, 1], "hardest_share": [NAN, 0, 1.1]}),
        (ImageDataModule, {"split_seed": [-1, 2**70], "shuffle_seed": [-1, 2**32]}),
        (ImageDataModule, {"crop_padding": [-1, 10**6], "cutout": [-1, 10**6], "train_sizes": [[], [0], [10**6]]}),
        (Synthetic, {"seed": [-1, 2**64], "train_size": [0, 3], "test_size": [9, 10**7], "batch_size": [0]}),
        (lambda **settings: ImageFolder("x", **settings), {"image_size": [0, 100_000], "workers": [-1, 10_000]}),
        (Mixup, {"alpha": [NAN, 0, -1, INF]}),
    ],
    ids=["batches", "shares", "seeds", "sizes", "synthetic", "folder", "mixup"],
)
def test_impossible_settings_are_refused(make, settings):
    for name, values in settings.items():
        for value in values:
            with pytest.raises(UserError, match=rf"^data\.(mix\.)?{name}=") as error:
                make(**{name: value})
            assert str(value) in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"val_fraction": 0.9}, {"val_fraction": 0.1}, {"cutout": 33}, {"crop_padding": 32}]
)
def test_the_remedy_works(settings):
    """What a message proposes is done."""
    with pytest.raises(UserError) as error:
        assert Synthetic(train_size=20, test_size=20, **settings).source
    name, value = str(error.value).rpartition("data.")[2].split()[0].rstrip(".").split("=")
    proposed = {"val_fraction": 0, name: int(value)}
    assert Synthetic(train_size=20, test_size=20, **proposed).source
