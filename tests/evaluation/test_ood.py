import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageOps
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import nn

import cifarnet
from cifarnet.data import Synthetic, Torchvision
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main
from cifarnet.evaluation import ood
from cifarnet.inference.predictor import Predictions, Predictor
from conftest import picture

QUICK = ["corruptions=false"]
SCORES = ["maximum probability", "energy", "maximum logit", "Mahalanobis distance"]
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return torch.from_numpy(RANDOM.normal(size=shape))


@pytest.fixture
def data():
    """Synthetic images of 32×32 pixels, of which 60 are for the test."""
    return Synthetic(train_size=100, test_size=60, batch_size=10)


@pytest.fixture
def pictures(tmp_path):
    """A folder of seven pictures of other sizes, in a folder and below it, and a file that is not a picture."""
    for number in range(7):
        folder = tmp_path / "pictures" / ("more" if number > 4 else "")
        picture(folder / f"{number}.png", (30 * number, 90, 9), (40 + number, 30))
    (tmp_path / "pictures/notes.txt").write_text("notes")
    return tmp_path / "pictures"


@pytest.mark.parametrize("round_to", [6, 0], ids=["distinct", "tied"])
@pytest.mark.parametrize("scale", [1, 1000, 0.001])
def test_separation_agrees_with_scikit_learn(round_to, scale):
    inside, outside = (normal(300) + 1).round(decimals=round_to) * scale, normal(170).round(decimals=round_to) * scale
    found = ood.separation(inside, outside)
    is_inside, scores = np.repeat([1, 0], [300, 170]), torch.cat([inside, outside]).numpy()
    assert found["auroc"] == pytest.approx(roc_auc_score(is_inside, scores), abs=1e-6)
    assert found["aupr_in"] == pytest.approx(average_precision_score(is_inside, scores), abs=1e-6)
    assert found["aupr_out"] == pytest.approx(average_precision_score(1 - is_inside, -scores), abs=1e-6)
    false_positives, true_positives, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    assert found["fpr95"]["accuracy"] == pytest.approx(false_positives[np.argmax(true_positives >= 0.95)])
    assert found["images"] == found["fpr95"]["images"] == 170


def test_the_interval_is_that_of_hanley_and_mcneil():
    """Their example: ratings from 1 to 5 of 51 abnormal and 58 normal images, area 0.893, standard error 0.032."""
    abnormal = torch.tensor([1.0, 2, 3, 4, 5]).repeat_interleave(torch.tensor([3, 2, 2, 11, 33]))
    normal = torch.tensor([1.0, 2, 3, 4, 5]).repeat_interleave(torch.tensor([33, 6, 6, 11, 2]))
    found = ood.separation(abnormal, normal)
    assert found["auroc"] == pytest.approx(0.893, abs=5e-4)
    low, high = found["auroc_interval"]
    assert (found["auroc"] - low) / 1.96 == pytest.approx(0.032, abs=1e-3)
    assert high - found["auroc"] == pytest.approx(found["auroc"] - low)


@pytest.mark.parametrize("count", [1, 40])
def test_the_interval_stays_between_0_and_1(count):
    scores = torch.arange(80.0)
    found = ood.separation(scores[40:], scores[:count])
    assert (found["auroc"], found["auroc_interval"], found["fpr95"]["accuracy"]) == (1, [1, 1], 0)
    found = ood.separation(scores[:40], scores[40 : 40 + count])
    assert (found["auroc"], found["auroc_interval"], found["fpr95"]["accuracy"]) == (0, [0, 0], 1)
    low, high = ood.separation(scores[40:], scores[42 : 42 + count])["auroc_interval"]
    assert 0 <= low < high <= 1


def test_mahalanobis_agrees_with_a_loop():
    train, others, labels = normal(200, 6) * 3, normal(30, 6) * 5, torch.from_numpy(RANDOM.integers(0, 4, 200))
    labels[labels == 2] = 3  # a class without images
    for features in (train, others):
        features[:, 4] = features[:, 0] + features[:, 1]  # a direction without variance
        features[:, 5] = 0
    x, y = train.numpy(), labels.numpy()
    means = {label: x[y == label].mean(0) for label in (0, 1, 3)}
    covariance = sum(np.outer(row - means[label], row - means[label]) for row, label in zip(x, y, strict=True)) / 200
    precision = np.linalg.pinv(covariance)
    expected = [
        min(np.sqrt((row - mean) @ precision @ (row - mean)) for mean in means.values()) for row in others.numpy()
    ]
    np.testing.assert_allclose(ood.mahalanobis(train, labels)(others), expected, rtol=1e-6)
    assert ood.mahalanobis(torch.ones(5, 3), torch.arange(5) % 2)(torch.zeros(2, 3)).tolist() == [0, 0]


def test_scores_by_hand():
    logits = torch.tensor([[2.0, 0, 0], [1, 1, 4]])
    found = ood.scores(Predictions(logits, logits, *[torch.zeros(2)] * 3), lambda features: features + 3)
    assert list(found) == SCORES
    powers = np.exp(logits.double().numpy())
    np.testing.assert_allclose(found["maximum probability"], powers.max(1) / powers.sum(1))
    assert found["maximum logit"].tolist() == [2, 4]
    np.testing.assert_allclose(found["energy"], np.log(powers.sum(1)))
    assert found["Mahalanobis distance"].tolist() == [-3, -3]


def test_results_of_a_run(run, pictures, tmp_path):
    """All results follow from the logits and features of single images."""
    measured = evaluate(run, [*QUICK, f"ood=[noise,{pictures}]", "seed=3"])
    found = measured["ood"]
    assert list(found) == ["noise", str(pictures)]
    source = Synthetic(train_size=300, test_size=60, batch_size=1).source
    network = cifarnet.load(run).network
    loader = ood.read(str(pictures), Synthetic(test_size=60), 0)[str(pictures)]
    [others] = [batch.images for batch in loader]
    with torch.no_grad():
        inside, outside = (network(images) for images in (source.test.images, others))
    for name, score in {"energy": torch.logsumexp, "maximum logit": torch.amax}.items():
        values = torch.cat([score(inside, 1), score(outside, 1)])
        expected = roc_auc_score(np.repeat([1, 0], [60, 7]), values)
        assert found[str(pictures)][name]["auroc"] == pytest.approx(expected, abs=1e-6), name
    embedded = [cifarnet.load(run).features(images) for images in (source.train.images, source.test.images, others)]
    distance = ood.mahalanobis(embedded[0], source.train.labels)
    values = torch.cat([-distance(embedded[1]), -distance(embedded[2])])
    found_area = found[str(pictures)]["Mahalanobis distance"]["auroc"]
    assert found_area == pytest.approx(roc_auc_score(np.repeat([1, 0], [60, 7]), values), abs=1e-6)
    assert found["noise"]["energy"]["images"] == 60
    page = (run / "evaluation/report.html").read_text()
    assert "Out-of-distribution detection" in page
    assert f"{pictures} (7 images)" in page
    assert 'class="ood"' in page
    assert json.loads((run / "evaluation/metrics.json").read_text())["ood"] == found
    assert evaluate(run, [*QUICK, "ood=noise", "seed=3"])["ood"]["noise"] == found["noise"]


def test_the_command_prints_the_areas(run, command):
    status, printed, _ = command(str(run), *QUICK, "ood=noise", main=main)
    assert status == 0
    scores = json.loads((run / "evaluation/metrics.json").read_text())["ood"]["noise"]
    assert ", ".join(f"{row['auroc']:.0%} by {score}" for score, row in scores.items()) in printed  # 60 images


def test_histograms_have_all_images():
    inside, outside = ({name: normal(count) * scale for name in SCORES} for count, scale in ((50, 1), (80, 9)))
    scores = {"test images": inside, "noise": outside}
    figure = ood.figures.score_histograms(scores)
    assert [axis.get_title() for axis in figure.axes] == SCORES
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(scores)
    for axis in figure.axes:
        for outline in axis.patches:  # from 0 up, and back to 0
            corners = outline.get_xy()
            width = np.diff(np.unique(corners[:, 0]))[0]
            assert corners[1:-1:2, 1].sum() * width == pytest.approx(1)


def test_paths_of_folders_fit_into_the_legend_of_the_histograms():
    names = ["test images", *(f"/home/somebody/experiments/pictures/of/textures/{i}" for i in range(3))]
    figure = ood.figures.score_histograms({name: {score: normal(9) for score in SCORES} for name in names})
    FigureCanvasAgg(figure).draw()
    (legend,), whole = figure.legends, figure.bbox
    assert whole.x0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= whole.x1
    assert legend.get_window_extent().y1 <= whole.y1


def test_noise_is_uniform_and_depends_on_the_seed(data):
    loaders = [ood.read("noise", data, seed)["noise"] for seed in (0, 0, 1)]
    first, again, other = (torch.cat([batch.images for batch in loader]) for loader in loaders)
    assert first.shape == (60, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    share = first.flatten().bincount(minlength=256) / first.numel()
    assert (share - 1 / 256).abs().max() < 6 * (1 / 256 / first.numel()) ** 0.5


def test_pictures_are_fitted_as_predict_does(run, pictures, data):
    loader = ood.read([str(pictures)], data, 0)[str(pictures)]
    [images] = [batch.images for batch in loader]
    decoded = [answer.pixels for answer in cifarnet.load(run).answers(pictures)]
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(np.stack(decoded)))


def test_data_sets_of_torchvision(tmp_path, monkeypatch, data):
    """Only the test images are read. The set has the files of the official format."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/MNIST/MNIST/raw"
    folder.mkdir(parents=True)
    pixels = RANDOM.integers(0, 256, (12, 28, 28), np.uint8)
    sizes = [number.to_bytes(4, "big") for number in pixels.shape]
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(b"".join([b"\0\0\x08\3", *sizes, pixels.tobytes()]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"".join([b"\0\0\x08\1", sizes[0], bytes(12)]))
    monkeypatch.setattr(Torchvision, "read", None)
    [images] = [batch.images for batch in ood.read("mnist", data, 0)["mnist"]]
    expected = [ImageOps.fit(Image.fromarray(image).convert("RGB"), (32, 32)) for image in pixels]
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected)))
    larger = SimpleNamespace(image_size=48, eval_batch_size=1000)
    [images] = [batch.images for batch in ood.read("MNIST", larger, 0)["MNIST"]]
    assert images.shape == (12, 3, 48, 48)


def test_cifar10_is_a_data_set_of_torchvision(archive, published, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/CIFAR10").mkdir(parents=True)
    (tmp_path / "data/CIFAR10" / published.filename).write_bytes(archive["bytes"])
    expected = torchvision.datasets.CIFAR10("data/CIFAR10", train=False, download=True).data
    [images] = [batch.images for batch in ood.read("cifar10", data, 0)["cifar10"]]
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("svnh", r"^ood=svnh: no such folder contains images\. Did you mean svhn\? Choose noise, "),
        ("niose", "Did you mean noise"),
        ("empty", "^ood=empty: no such folder contains images"),
        ("cococaptions", "CocoCaptions has no training and test images"),
        ("[noise,broken]", r"^broken/a\.png cannot be read as an image"),
        ("3", "^ood=3 is not valid"),
    ],
)
def test_sets_that_cannot_be_used(run, tmp_path, monkeypatch, value, message):
    """They are refused before anything is computed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_text("no picture")
    monkeypatch.setattr(Predictor, "predict_all", None)
    with pytest.raises(UserError, match=message):
        evaluate(run, [*QUICK, f"ood={value}"])


class Headless(nn.Module):
    """A network without a linear or convolutional layer."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_classes, 3))

    def forward(self, images):
        return images.float().mean((2, 3)) / 255 @ self.weights.T


@pytest.mark.parametrize("setting", ["ood=noise", "features=true"])
def test_a_network_without_a_head_is_refused(config, tmp_path, setting):
    from cifarnet.train import train

    name = f"{Headless.__module__}.Headless"
    train(config("~model", f"+model={{_target_: {name}}}", "scheduler=constant", without="model"))
    with pytest.raises(UserError, match=r"could be its head.*ood and features"):
        evaluate(tmp_path / "run", [*QUICK, setting, f"classes=[{name}]"])
