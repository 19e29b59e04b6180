import threading
import time

import numpy as np
import pytest
from PIL import Image

from cifarnet.data import pixels
from cifarnet.data.decoding import CHUNK, decode_all

IMAGE = np.zeros((4, 4), np.uint8)


@pytest.fixture
def decoding(monkeypatch):
    """Call a function for each image instead of fitting it: decoding(function)."""

    def replace(function):
        monkeypatch.setattr(pixels, "fitted", lambda image, size: function() or Image.new("RGB", (size, size)))

    return replace


@pytest.mark.parametrize(("ahead", "workers"), [(3, 2), (1, 1), (5, 4), (100, 2)])
def test_the_number_of_images_that_are_decoded_ahead(decoding, ahead, workers):
    """Twice `ahead`, and a task for every worker."""
    started = []
    decoding(lambda: started.append(1))
    decoded = decode_all([IMAGE] * 2000, 4, ahead, workers)
    next(decoded)
    task = min(CHUNK, ahead)
    expected = range(2 * ahead + task * workers, 2 * ahead + task * (workers + 1))
    end = time.monotonic() + 10
    while len(started) < expected.start and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(started) in expected
    assert len(list(decoded)) == 1999


@pytest.mark.parametrize("count", [4, 16])
def test_all_workers_decode_a_few_images(decoding, count):
    all_at_work = threading.Barrier(4)
    decoding(lambda: all_at_work.wait(timeout=5) and None)
    pixels_of_all = [value for _, value in decode_all([IMAGE] * count, 4, 50, 4)]
    assert [getattr(value, "shape", value) for value in pixels_of_all] == [(4, 4, 3)] * count


def test_images_that_are_no_longer_needed_are_not_decoded(decoding):
    started = []
    decoding(lambda: started.append(time.sleep(0.01)) and None)
    decoded = decode_all([IMAGE] * 2000, 4, 100, 2)
    next(decoded)
    before = len(started)
    decoded.close()
    assert len(started) <= before + 4 * CHUNK  # the tasks in progress, and those that began meanwhile


def test_an_image_that_raises_any_error_is_reported_in_one_line(decoding):
    errors = [OSError("broken\n  block"), ValueError()]

    def fail():
        raise errors.pop(0)

    decoding(fail)
    messages = [message for _, message in decode_all([IMAGE, IMAGE], 4, 1, 1)]
    assert messages == ["An image cannot be read (broken block).", "An image cannot be read (ValueError)."]
