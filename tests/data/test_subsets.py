import math
import shutil
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cifarnet.build import build, make_data
from cifarnet.config import deciding_settings
from cifarnet.data import InMemoryLoader, Synthetic
from cifarnet.data.augmentation import Augment
from cifarnet.data.subsets import Selection, balanced, balanced_weights, long_tail, noisy, read_integers
from cifarnet.errors import UserError
from cifarnet.recipes.mixup import Mixup
from cifarnet.resuming import resume
from cifarnet.train import train

SIZES = [9, 13, 24, 5, 30]  # images of each class
LABELS = torch.cat([torch.full((size,), label) for label, size in enumerate(SIZES)])[
    torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(1))
]


def select(**settings):
    return Selection(**settings).select(LABELS, len(SIZES))


def pixels(split):
    assert isinstance(split.images, torch.Tensor)
    return split.images


def counts(labels):
    return torch.bincount(labels, minlength=len(SIZES)).tolist()


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("split_seed", [0, 1])
def test_folds_have_the_properties_of_stratified_folds(folds, split_seed):
    parts = [select(folds=folds, fold=fold, split_seed=split_seed) for fold in range(folds)]
    assert sorted(index for part in parts for index in part.val.tolist()) == list(range(len(LABELS)))
    for part in parts:  # the rest of the images is trained on, in the order of the data set
        assert part.train.tolist() == sorted({*range(len(LABELS))} - {*part.val.tolist()})
    in_fold = np.array([counts(LABELS[part.val]) for part in parts])
    assert (np.ptp(in_fold, axis=0) <= 1).all()  # of each class
    assert np.ptp(in_fold.sum(1)) <= 1
    others = select(folds=folds, fold=0, split_seed=split_seed + 1)
    assert not torch.equal(others.val, parts[0].val)


def test_folds_are_as_large_as_those_of_scikit_learn():
    model_selection = pytest.importorskip("sklearn.model_selection")
    theirs = model_selection.StratifiedKFold(5, shuffle=True, random_state=0).split(LABELS, LABELS)
    ours = [select(folds=5, fold=fold).val for fold in range(5)]
    our_counts, their_counts = (
        np.array([[*counts(LABELS[val]), len(val)] for val in folds]) for folds in (ours, [val for _, val in theirs])
    )
    assert np.sort(our_counts, axis=0).tolist() == np.sort(their_counts, axis=0).tolist()  # of each class, and in all


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 5}, r"data\.fold=null is not one of the 5 folds.*range\(5\)"),
        ({"folds": 5, "fold": 5}, r"data\.fold=5 .*data\.fold=4"),
        ({"fold": 1}, r"data\.fold=1 .*data\.folds=5"),
        ({"folds": 6, "fold": 0}, r"data\.folds=6: the smallest class has 5 .*at most 5"),
        ({"train_share": 0.1, "images_per_class": 3}, r"data\.train_share=0\.1 and data\.images_per_class=3.*Remove"),
        (
            {"images_per_class": 6, "val_fraction": 0},
            r"data\.images_per_class=6: the smallest class has 5 .*Select more",
        ),
        ({"noise_type": "pairs"}, r"data\.noise_type=pairs .*data\.label_noise="),
    ],
)
def test_settings_that_select_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        select(**settings)


def test_smaller_shares_are_subsets_of_larger_ones():
    previous: set = set()
    for share in (0.05, 0.2, 0.5, 1):
        train, val, *_ = select(train_share=share)
        of_class = [round(size * 0.1) for size in SIZES]
        expected = [max(1, round((size - held) * share)) for size, held in zip(SIZES, of_class, strict=True)]
        assert counts(LABELS[train]) == expected
        assert previous < {*train.tolist()}
        assert torch.equal(val, select().val)
        previous = {*train.tolist()}
    assert counts(LABELS[select(images_per_class=4).train]) == [4] * 5


@pytest.mark.parametrize("imbalance", [1, 10, 100, 49])
def test_a_long_tail_has_the_published_numbers(imbalance):
    # the loop of Cui et al. and of Cao et al. (2019) for 5,000 images of the largest of 10 classes
    published = [int(5000 * (1 / imbalance) ** (label / 9) + 1e-6) for label in range(10)]
    assert long_tail(5000, imbalance, 10) == published
    assert published[9] == math.floor(5000 / imbalance)
    tail = Selection(imbalance=2, val_fraction=0).select(torch.arange(200) % 5, 5)
    assert counts((torch.arange(200) % 5)[tail.train]) == [40, 33, 28, 23, 20]  # 40 × 2^(-c/4)


@pytest.mark.parametrize("share", [0, 0.2, 0.45])
def test_noise_changes_the_labels_of_a_share_of_each_class(share):
    labels, random = torch.arange(5).repeat_interleave(2000), torch.Generator()
    symmetric = noisy(labels, share, "symmetric", 5, random.manual_seed(0))
    pairs = noisy(labels, share, "pairs", 5, random.manual_seed(0))
    for label in range(5):
        wrong = symmetric[labels == label][symmetric[labels == label] != label]
        assert len(wrong) == round(2000 * share)
        others = torch.bincount(wrong, minlength=5)[torch.arange(5) != label] if share else torch.zeros(4)
        assert (others - len(wrong) / 4).abs().max() <= 4 * math.sqrt(len(wrong) * 3 / 16)  # four standard deviations
        assert counts(pairs[labels == label])[(label + 1) % 5] == round(2000 * share)
        assert counts(pairs[labels == label])[label] == 2000 - round(2000 * share)


def test_only_training_labels_are_changed(tmp_path):
    noisy_labels = np.random.default_rng(0).integers(0, 10, 100)
    np.savetxt(tmp_path / "labels.txt", noisy_labels, "%d")
    np.save(tmp_path / "labels.npy", noisy_labels)
    true = torch.arange(100) % 10
    for file in ("labels.txt", "labels.npy"):
        data = Synthetic(train_size=100, test_size=20, val_fraction=0.2, labels=str(tmp_path / file))
        index = data.source.train_index
        assert index is not None
        assert data.source.train.labels.tolist() == noisy_labels[index].tolist()
        assert data.source.validation.labels.bincount().tolist() == [2] * 10
        whole = Synthetic(train_size=100, test_size=20, val_fraction=0).source.train
        assert torch.equal(pixels(data.source.train), pixels(whole)[index])  # which `train_index` describes
        described = data.describe()
        assert described["wrong_labels"] == sum(noisy_labels[index] != true[index].numpy())
        assert described["train_per_class"] == np.bincount(noisy_labels[index], minlength=10).tolist()
    noisy = Synthetic(train_size=100, test_size=20, val_fraction=0.2, label_noise=0.5)
    assert noisy.describe()["wrong_labels"] == 40
    assert torch.equal(noisy.source.validation.labels, data.source.validation.labels)
    assert not {"wrong_labels", "train_per_class"} & {*Synthetic(train_size=100, test_size=20).describe()}


def test_a_file_chooses_the_training_images(tmp_path):
    (tmp_path / "keep.txt").write_text("\n".join(map(str, range(0, 90, 2))))
    data = Synthetic(train_size=100, test_size=20, keep=str(tmp_path / "keep.txt"))
    plain = Synthetic(train_size=100, test_size=20).source.train_index
    assert data.source.train_index is not None
    assert plain is not None
    assert data.source.train_index.tolist() == [index for index in plain.tolist() if index in range(0, 90, 2)]


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("labels", "1\n2\n", "has 2 labels for 100 training images.*one label for each"),
        ("labels", "1\nfrog\n", "frog.*one integer from 0 to 9 per line"),
        ("labels", "10\n" * 100, "contains 10.*0 to 9"),
        ("keep", "-1\n", "contains -1.*0 to 99"),
        ("keep", None, "labels.txt.*not found"),
    ],
)
def test_other_files_are_refused(tmp_path, setting, content, message):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"^data\.{setting}={path}.*{message}"):
        _ = Synthetic(train_size=100, test_size=20, **{setting: str(path)}).source  # pyright: ignore[reportArgumentType]


def test_all_folds_have_one_checksum():
    folds = [Synthetic(train_size=100, test_size=20, folds=4, fold=fold).describe()["sha256"] for fold in range(4)]
    assert len({*folds}) == 1
    assert folds[0] != Synthetic(train_size=101, test_size=20, folds=4, fold=0).describe()["sha256"]


def test_all_selections_have_the_checksum_of_the_data_set(tmp_path):
    (tmp_path / "keep.txt").write_text("\n".join(map(str, range(50))))
    (tmp_path / "labels.txt").write_text("\n".join(["3"] * 100))
    files: Any = {"keep": str(tmp_path / "keep.txt"), "labels": str(tmp_path / "labels.txt")}
    plain = Synthetic(train_size=100, test_size=20).describe()["sha256"]
    changes: list[Any] = [{"train_share": 0.5}, {"label_noise": 0.3}, {"imbalance": 3}, {"keep": files["keep"]}, files]
    assert {Synthetic(train_size=100, test_size=20, **change).describe()["sha256"] for change in changes} == {plain}


def test_the_content_of_the_files_is_identified(tmp_path):
    def described(**settings: Any) -> str:
        return Synthetic(train_size=100, test_size=20, **settings).describe()["files_sha256"]

    labels = [number % 7 for number in range(100)]
    text, array, other, keep = (str(tmp_path / name) for name in ("a.txt", "a.npy", "b.txt", "keep.txt"))
    np.savetxt(text, labels, "%d")
    np.save(array, labels)
    np.savetxt(other, [*labels[:-1], 9], "%d")
    np.savetxt(keep, range(60), "%d")
    assert described(labels=text) == described(labels=array, folds=2, fold=1) == described(labels=text, label_noise=0.1)
    different = [{"labels": text}, {"labels": other}, {"labels": text, "keep": keep}, {"keep": keep}]
    assert len({described(**settings) for settings in different}) == 4
    assert "files_sha256" not in Synthetic(train_size=100, test_size=20, train_share=0.5).describe()


def test_paths_may_be_relative_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keep.txt").write_text("3\n5\n")
    assert read_integers("data.keep", "~/keep.txt", 10).tolist() == [3, 5]


def test_an_epoch_of_the_balanced_sampler():
    first = balanced(LABELS, 0, 3)
    assert len(first) == len(LABELS)
    assert sorted(counts(LABELS[first])) == [16, 16, 16, 16, 17]
    for label in range(5):  # all images of a class occur equally often, except for one time
        members = Counter(first[LABELS[first] == label].tolist())
        times = [members[index] for index, of in enumerate(LABELS.tolist()) if of == label]
        assert max(times) - min(times) <= 1
    assert torch.equal(first, balanced(LABELS, 0, 3))
    assert not torch.equal(first.sort().values, balanced(LABELS, 0, 4).sort().values)
    assert not torch.equal(first.sort().values, balanced(LABELS, 1, 3).sort().values)


def test_weights_of_classes():
    weights = balanced_weights(torch.tensor([0, 0, 0, 2]), 3)
    assert weights == pytest.approx([4 / (2 * 3), 0, 4 / (2 * 1)])


def loader(**settings):
    images = torch.randint(
        0, 256, (len(LABELS), 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    settings = {"train": True, "augment": Augment(2, "random"), "balanced": True, "seed": 5} | settings
    return images, InMemoryLoader(images, LABELS, 10, **settings)


def test_batches_of_the_balanced_sampler_equal_a_loop():
    images, batches = loader(mix=Mixup(1.0))
    batches.set_epoch(2)
    drawn, order = balanced(LABELS, 5, 2), batches.order()
    rows = Augment(2, "random").draw(len(LABELS), 12, 5, 2)
    partner, lam = Mixup(1.0).draw(len(LABELS), 12, 5, 2)
    for number, batch in enumerate(batches):
        for place, position in enumerate(order[10 * number : 10 * number + 10]):
            pair = []
            for number_of_image in (position, partner[position]):
                top, left, flip, _ = (int(row[number_of_image].flatten()[0]) for row in rows)
                padded = np.pad(images[drawn[number_of_image]].numpy(), ((0, 0), (2, 2), (2, 2)), "reflect")
                crop = padded[:, top : top + 12, left : left + 12]
                pair.append(torch.tensor(crop[:, :, ::-1].copy() if flip else crop).float())
            mixed = torch.lerp(pair[1], pair[0], lam[position]).round()
            assert (batch.images[place] - mixed).abs().max() == 0
            assert batch.index[place] == drawn[position]
            assert batch.labels[place] == LABELS[drawn[position]]
            assert batch.partners is not None
            assert batch.partners[place] == LABELS[drawn[partner[position]]]


def test_ranks_share_the_batches_of_the_balanced_sampler():
    _, whole = loader()
    parts = [loader(rank=rank, world_size=2)[1] for rank in (0, 1)]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one.index, torch.cat([half.index for half in halves]))
        assert torch.equal(one.images, torch.cat([half.images for half in halves]))


@pytest.mark.parametrize("settings", [{"hardest_share": 0.5}, {"flip": "alternating"}])
def test_settings_that_the_balanced_sampler_excludes(settings):
    [(name, value)] = settings.items()
    message = rf"data\.sampler=balanced .*data\.{name}={value}\. Remove one of them\."
    with pytest.raises(UserError, match=message):
        Synthetic(sampler="balanced", **settings)


SETTINGS = [
    (["data.folds=4", "data.fold=2", "data.label_noise=0.3", "data.noise_type=pairs"], 40),  # round(0.3 × 15) of each
    (["data.imbalance=4", "data.sampler=balanced", "+recipe=mixup", "data.train_share=0.8"], 0),
    (["data.images_per_class=9"], 0),
]


@pytest.mark.parametrize(("settings", "num_wrong"), SETTINGS)
def test_a_stopped_run_equals_one_that_was_not_stopped(resumed_run, settings, num_wrong):
    assert resumed_run("data.batch_size=16", *settings).data.get("wrong_labels") == num_wrong


@pytest.fixture
def files(tmp_path):
    """Write files of labels, of which ten are wrong, and of 150 positions, for the 200 images of `config`."""
    labels = Synthetic(train_size=200, test_size=50, val_fraction=0).source.train.labels
    labels[:10] = (labels[:10] + 1) % 10
    np.savetxt(tmp_path / "labels.txt", labels, "%d")
    np.save(tmp_path / "keep.npy", np.arange(150))
    return [f"data.labels={tmp_path}/labels.txt", f"data.keep={tmp_path}/keep.npy", "data.batch_size=16"]


def test_a_stopped_run_needs_the_content_of_its_files(resumed_run, files, tmp_path):
    moved = f"data.labels={tmp_path}/moved.txt"
    move = partial(shutil.move, tmp_path / "labels.txt", tmp_path / "moved.txt")
    record = resumed_run(*files, meanwhile=move, changes=[moved])
    assert 5 <= record.data["wrong_labels"] <= 10  # a tenth is validated on
    np.savetxt(tmp_path / "moved.txt", np.zeros(200), "%d")
    with pytest.raises(UserError, match=r"trained on other images: files_sha256 was \w+ and is now .*data\.labels=…"):
        train(*resume(tmp_path / "parts", [moved]))


def test_two_ranks_train_on_the_same_images_and_labels(sharded_run, files):
    selected = ["data.folds=4", "data.fold=1", "data.imbalance=2", "data.train_share=0.9", "data.label_noise=0.2"]
    sharded_run(*files, *selected, "data.sampler=balanced", "data.noise_type=pairs")


def test_settings_that_are_not_used_do_not_distinguish_runs(config):
    recorded: Any = OmegaConf.to_container(config())
    expected = {"_target_", "train_size", "test_size", "seed", "batch_size", "eval_batch_size", "val_fraction"}
    expected |= {"split_seed", "crop_padding", "flip", "cutout", "hardest_share", "shuffle_seed"}  # as before
    found = {key[5:] for key in deciding_settings(recorded) if key.startswith("data.")}
    assert found == expected


def test_folds_replace_the_validation_fraction(config):
    data = make_data(config("data.folds=4", "data.fold=3", "data.val_fraction=0"))
    assert data.validates
    assert [len(data.source.train), len(data.source.validation)] == [150, 50]


def test_folds_of_a_data_set_with_validation_images_are_refused(config):
    class Divided(Synthetic):
        def read(self):
            source = super().read()
            source.val = source.test
            return source

    with pytest.raises(UserError, match=r"data\.folds=2.*data\.folds=null data\.fold=null"):
        _ = Divided(train_size=40, test_size=20, folds=2, fold=0).source
    subset = Divided(train_size=40, test_size=20, images_per_class=2).source
    assert [len(subset.train), len(subset.validation)] == [20, 20]


def test_the_network_sees_the_statistics_of_the_selected_images(config):
    _, classifier, data, _ = build(config("data.train_share=0.3"))
    mean = pixels(data.source.train).double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(classifier.network.get_buffer("normalize.mean").flatten(), mean.float())
