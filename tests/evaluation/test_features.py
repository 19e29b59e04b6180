import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.neighbors import KNeighborsClassifier

import cifarnet
from cifarnet.data import Split, Synthetic
from cifarnet.evaluate import evaluate, main
from cifarnet.evaluation import features
from cifarnet.evaluation.figures import feature_map
from cifarnet.inference.predictor import Predictions, Predictor

RANDOM = np.random.default_rng(0)
SETTINGS = ["corruptions=false", "features=true"]


def clusters(count: int, dimensions: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of four overlapping classes, and their labels."""
    labels = torch.arange(count) % 4
    centers = np.random.default_rng(1).normal(size=(4, dimensions))
    scales = np.logspace(-1, 1, dimensions)
    return torch.from_numpy(
        (centers[labels.numpy()] + RANDOM.normal(size=(count, dimensions))) * scales
    ).float(), labels


@pytest.fixture(scope="module")
def measured(run):
    """The evaluation of a run, and the content of its features.npz."""
    record = evaluate(run, [*SETTINGS, "ood=noise"])
    with np.load(run / "evaluation/features.npz") as file:
        return record, dict(file)


def test_the_head_turns_the_features_into_the_logits(run, measured):
    record, file = measured
    network, class_names = cifarnet.load(run)
    source = Synthetic(train_size=300, test_size=60, batch_size=1).source
    with torch.no_grad():
        logits = network(source.test.images)
    np.testing.assert_allclose(file["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(file["features"] @ network.head.weight.detach().numpy().T, logits, atol=1e-4)
    assert file["features"].shape == (60, record["features"]["dimensions"])
    assert {name: str(file[name].dtype) for name in file if name != "class_names"} == {
        **{"features": "float32", "logits": "float32", "labels": "int64"}
    }
    assert file["labels"].tolist() == source.test.labels.tolist()
    assert file["class_names"].tolist() == class_names


def test_accuracies_follow_from_the_features(run, measured):
    record, file = measured
    source = Synthetic(train_size=300, test_size=60, batch_size=1).source
    train, found = cifarnet.load(run).features(source.train.images), record["features"]
    assert len(train) == 270
    neighbors = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(train, source.train.labels)
    assert found["nearest_neighbors"]["accuracy"] == neighbors.score(file["features"], file["labels"])
    probe = features.classifiers()["linear_probe"].fit(train.numpy(), source.train.labels.numpy())
    assert found["linear_probe"]["accuracy"] == probe.score(file["features"], file["labels"])
    for part in ("linear_probe", "nearest_neighbors"):
        low, high = found[part]["interval"]
        assert low < found[part]["accuracy"] < high
    page = (run / "evaluation/report.html").read_text()
    for shown in ("linear probe", "20 nearest neighbors", "270\ntraining images", 'class="feature_map"'):
        assert shown in page


def test_the_training_images_are_embedded_once(run, monkeypatch, tmp_path):
    titles, embed = [], Predictor.embed

    def count(predictor, batches, title):
        titles.append(title)
        return embed(predictor, batches, title)

    monkeypatch.setattr(Predictor, "embed", count)
    evaluate(run, [*SETTINGS, "ood=noise", "tta=mirror", f"output_dir={tmp_path}"])
    assert sorted(titles) == ["features of the test images", "features of the training images", "noise"]
    assert (tmp_path / "features.npz").exists()


def test_nearest_neighbors_agree_with_a_loop():
    (train, labels), (test, _) = clusters(300), clusters(90)
    train[3] = 0  # similar to nothing
    expected = []
    for row in test.numpy():
        lengths = np.linalg.norm(row) * np.linalg.norm(train, axis=1)
        similarities = [row @ other / max(length, 1e-12) for other, length in zip(train.numpy(), lengths, strict=True)]
        nearest = np.argsort(similarities)[-20:]
        expected.append(np.bincount(labels.numpy()[nearest]).argmax())
    classifier = features.classifiers()["nearest_neighbors"].fit(train.numpy(), labels.numpy())
    assert classifier.predict(test.numpy()).tolist() == expected


def test_the_linear_probe_minimizes_its_objective():
    """Multinomial logistic regression on standardized features: sum of cross-entropies + squared weights / 2."""
    (train, labels), (test, _) = clusters(300), clusters(400)
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0)
    inputs, unseen = ((part.double() - mean) / deviation for part in (train, test))

    def objective(flat):
        parameters = torch.tensor(flat.reshape(6, 4), requires_grad=True)
        loss = F.cross_entropy(inputs @ parameters[:5] + parameters[5], labels, reduction="sum")
        loss = loss + parameters[:5].square().sum() / 2
        loss.backward()
        return loss.item(), parameters.grad.flatten().numpy()

    best = minimize(objective, np.zeros(24), jac=True, tol=1e-10).x.reshape(6, 4)
    expected = (unseen.numpy() @ best[:5] + best[5]).argmax(1)
    predicted = features.classifiers()["linear_probe"].fit(train.numpy(), labels.numpy()).predict(test.numpy())
    assert (predicted == expected).mean() > 0.99
    assert len({*expected.tolist()}) == 4


@pytest.mark.parametrize("classes", [3, 15, 100])
def test_the_map_shows_each_image_at_its_place(classes):
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    positions, labels = RANDOM.normal(size=(200, 2)), np.arange(200) % classes
    split = Split(images, torch.from_numpy(labels))
    figure = feature_map(positions, split, [f"class {i}" for i in range(classes)])
    (axis,) = figure.axes
    places = (positions - positions.min(0)) / (positions.max(0) - positions.min(0)).max()
    for number, line in enumerate(axis.lines):
        np.testing.assert_allclose(line.get_xydata(), places[labels == number])
    assert len(axis.lines) == classes
    assert 10 < len(axis.artists) < 200
    for box in axis.artists:
        (number,) = np.flatnonzero(np.isclose(places, box.xy).all(1))
        pixels = torch.tensor(np.asarray(box.offsetbox.get_data()))
        assert torch.equal(pixels, images[number].permute(1, 2, 0))
        assert box.patch.get_edgecolor()[:3] == pytest.approx(tuple(axis.lines[labels[number]].get_color()[:3]))
    assert len(figure.legends) == (classes <= 20)


def test_fewer_training_images_than_neighbors(tmp_path):
    """Every training image is a neighbor, so the first of the most frequent classes is predicted."""
    train, test = (
        Predictions(torch.zeros(count, 4), torch.zeros(count, 4), labels, torch.arange(count), vectors)
        for count in (12, 3)
        for vectors, labels in [clusters(count)]
    )
    data = SimpleNamespace(
        class_names=list("abcd"), source=SimpleNamespace(test=Split(torch.zeros(3, 3, 8, 8).byte(), test.labels))
    )
    config = SimpleNamespace(features=True, output_dir=tmp_path, seed=0)
    record, _ = features.section(SimpleNamespace(config=config, data=data, features=(train, test)))
    assert record["neighbors"] == 12
    assert record["nearest_neighbors"]["accuracy"] == (test.labels == 0).sum() / 3


def test_a_missing_package_is_reported_before_anything_is_computed(run, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(Predictor, "predict_all", None)
    status, _, error = command(str(run), *SETTINGS, main=main)
    assert status == 1
    assert "pip install 'cifarnet[features]'" in error
    assert error.count("\n") == 1
