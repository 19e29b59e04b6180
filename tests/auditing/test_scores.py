"""The scores of an audit, compared with loops over the epochs of each image."""

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest

from cifarnet.auditing import scores
from cifarnet.errors import UserError

EPOCHS, CLASSES = 13, 4


def made_up(index, seed=0, shift=0) -> dict[str, np.ndarray]:
    """Return the dynamics of images at these positions, of which an epoch uses four of five."""
    random, count = np.random.default_rng(seed), len(index)
    used = random.random((EPOCHS, count)) < 0.8
    used[0] = True
    arrays = {name: random.random((EPOCHS, count)) for name in ("loss", "probability", "error")}
    arrays["margin"] = random.normal(size=(EPOCHS, count))
    arrays = {name: np.where(used, values, math.nan).astype(np.float16) for name, values in arrays.items()}
    arrays["predicted"] = np.where(used, random.integers(0, CLASSES, (EPOCHS, count)), -1).astype(np.int8)
    arrays["predicted"][used[:, 0], 0] = 1
    labels = (np.array(index) + shift) % CLASSES
    labels[1] = 2
    arrays["predicted"][arrays["predicted"][:, 1] == 2, 1] = 3  # never right
    return {**arrays, "labels": labels, "index": np.array(index), "class_names": np.array(list("abcd"))}


def by_hand(run, image) -> dict[str, float]:
    """Compute the scores of an image with a loop over its epochs."""
    uses = [epoch for epoch in range(EPOCHS) if run["predicted"][epoch, image] >= 0]
    label = run["labels"][image]
    right = [run["predicted"][epoch, image] == label for epoch in uses]
    forgotten = 0
    for before, after in itertools.pairwise(right):
        if before and not after:
            forgotten += 1
    probability, margin, error = (
        [float(run[name][epoch, image]) for epoch in uses] for name in ("probability", "margin", "error")
    )
    return {
        "forgetting": forgotten if any(right) else EPOCHS,
        "negative_aum": -statistics.fmean(margin),
        "hardness": 1 - statistics.fmean(probability),
        "variability": statistics.pstdev(probability),
        "el2n": statistics.fmean(error[:10]),
    }


def test_scores_are_those_of_a_loop_over_the_epochs():
    run = made_up(range(30))
    found = scores.of_run(run)
    expected = [by_hand(run, image) for image in range(30)]
    assert found.keys() == expected[0].keys()
    for name, values in found.items():
        assert values.tolist() == pytest.approx([row[name] for row in expected]), name
    assert found["forgetting"][1] == EPOCHS
    assert len(set(found["forgetting"])) > 3


def test_scores_of_several_runs_are_means_over_the_runs_that_used_an_image():
    runs = [made_up(range(0, 20), seed=1), made_up([*range(0, 2), *range(10, 30)], seed=2)]
    scored = scores.combine(runs)
    assert scored.index.tolist() == list(range(30))
    for row, position in enumerate(scored.index.tolist()):
        having = [(run, run["index"].tolist().index(position)) for run in runs if position in run["index"]]
        assert len(having) == 1 + (position < 2 or 10 <= position < 20)
        expected = [by_hand(run, image) for run, image in having]
        for name, values in scored.values.items():
            assert values[row] == pytest.approx(statistics.fmean(one[name] for one in expected)), name
        label = having[0][0]["labels"][having[0][1]]
        assert scored.given[row] == label
        votes = Counter(
            int(guess) for run, image in having for guess in run["predicted"][:, image] if guess not in (-1, label)
        )
        most = max(votes.values(), default=0)
        if most:
            assert scored.suggested[row] == min(guess for guess, count in votes.items() if count == most)
        else:
            assert scored.suggested[row] == label
    order = sorted(range(30), key=lambda row: -scored.values[scored.order][row])
    assert scored.ranked.tolist() == order
    assert scored.count == round(0.01 * 30)


def test_an_image_without_another_prediction_keeps_its_label():
    run = made_up(range(5))
    run["labels"][0] = 1
    assert scores.combine([run]).suggested[0] == 1


def test_runs_with_other_labels_or_classes_are_refused():
    one = made_up(range(20))
    for other in (made_up(range(5, 20), shift=1), one | {"class_names": np.array(list("abce"))}):
        with pytest.raises(UserError, match=r"different classes or labels.*same data.*data\.labels=<file>"):
            scores.combine([one, other])


@pytest.fixture
def write(tmp_path):
    def save(name, **arrays):
        (tmp_path / name).mkdir(parents=True)
        np.savez(tmp_path / name / "dynamics.npz", **arrays)

    return save


def test_runs_and_the_runs_of_a_sweep_are_read(write, tmp_path):
    for number in (0, 1):
        write(f"sweep/{number}", **made_up(range(20), seed=number))
    write("run", **made_up(range(20), seed=2))
    runs = scores.read([tmp_path / "run", tmp_path / "sweep", tmp_path / "sweep/0"])
    assert [str(path.relative_to(tmp_path)) for path in runs] == ["run", "sweep/0", "sweep/1"]
    for number, run in enumerate(runs.values()):
        expected = made_up(range(20), seed=[2, 0, 1][number])
        assert run.keys() == expected.keys()
        for name in run:
            np.testing.assert_array_equal(run[name], expected[name])


def test_images_that_no_epoch_used_are_left_out(write, tmp_path):
    arrays = made_up(range(20))
    arrays["predicted"][:, 7] = -1
    write("run", **arrays)
    [run] = scores.read([tmp_path / "run"]).values()
    assert run["index"].tolist() == [*range(7), *range(8, 20)]
    assert run["loss"].shape == (EPOCHS, 19)


def test_missing_and_damaged_files_are_reported(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere contains no dynamics\.npz.*callbacks=dynamics"):
        scores.read([tmp_path / "nowhere"])
    write("run", **made_up(range(20)))
    file = tmp_path / "run/dynamics.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"dynamics\.npz cannot be read.*Train the run again"):
        scores.read([tmp_path / "run"])
    write("other", **{name: values for name, values in made_up(range(20)).items() if name != "predicted"})
    with pytest.raises(UserError, match=r"dynamics\.npz cannot be read.*predicted"):
        scores.read([tmp_path / "other"])


def test_code_in_a_file_is_not_run(write, tmp_path):
    arrays = made_up(range(20))
    arrays["class_names"] = np.array([print], dtype=object)
    write("run", **arrays)
    with pytest.raises(UserError, match=r"dynamics\.npz cannot be read"):
        scores.read([tmp_path / "run"])
