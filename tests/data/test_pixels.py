import math

import numpy as np
import pytest
import torch

from cifarnet.data.pixels import as_image, describe_left_out


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_pictures_are_rounded(kind, dtype):
    assert np.asarray(as_image(kind(np.full((2, 2), 0.999, dtype)))).tolist() == [[255, 255], [255, 255]]
    values = [level / 255 + shift for level in range(1, 255) for shift in (-0.0019, -0.0001, 0.0001, 0.0019)]
    expected = [math.floor(255 * value + 0.5) for value in values]  # within 0.5 / 255 = 0.00196 of a level
    assert np.asarray(as_image(kind(np.array([values], dtype)))).tolist() == [expected]


def test_endings_are_counted():
    assert describe_left_out([".heic"]) == "1 file left out: 1 .heic."
    assert describe_left_out([".a"] * 1000 + [".b"]) == "1,001 files left out: 1,000 .a, 1 .b."
