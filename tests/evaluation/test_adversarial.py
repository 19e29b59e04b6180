"""Attacks, compared with loops over single images, and with linear networks, whose strongest attacks are known."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sections import Coloured, measure
from torch import nn

from cifarnet.checkpoint import Checkpoint
from cifarnet.data import Split
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main
from cifarnet.evaluation import adversarial
from cifarnet.evaluation.adversarial import L2, LINF, Ball, autoattack, pgd, square
from cifarnet.inference.figures import RIGHT, WRONG
from cifarnet.inference.predictor import Predictor
from cifarnet.inference.test_images import sample
from cifarnet.seeding import generator
from conftest import picture

BALLS = {"PGD L∞ 8/255": LINF, "PGD L2 0.5": L2}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class Convolutional(nn.Module):
    """A small network with random weights, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
        self.layers = nn.Sequential(*layers).double().eval()
        self.layers[1].running_mean.copy_(torch.randn(8))
        self.layers[4].weight.data *= 20

    def forward(self, images):
        return self.layers(images)


class Linear(nn.Module):
    """Logits that are linear in the pixels, [B, num_classes]. Pixels are from 0 to 1; uint8 images are scaled."""

    def __init__(self, num_classes: int = 2, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(num_classes, 3 * size**2, seed=1).float() - 0.5)

    def forward(self, images):
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - 0.5).flatten(1) @ self.weight.T

    def margins(self, images, labels, norm):
        """Return the largest eps, of each image, at which no change within eps leads to another class, unless it would
        leave the range of pixels: the smallest logit difference divided by the dual norm of its weights."""
        logits, distances = self(images).double(), []
        for row, label in zip(logits, labels.tolist(), strict=True):
            others = [j for j in range(len(row)) if j != label]
            dual = {"Linf": 1, "L2": 2}[norm]
            sizes = [torch.linalg.vector_norm((self.weight[label] - self.weight[j]).double(), dual) for j in others]
            distances.append(min((row[label] - row[j]) / size for j, size in zip(others, sizes, strict=True)))
        return torch.stack(distances)


def gray(count: int, size: int = 8, spread: float = 0.2) -> torch.Tensor:
    """Return images with pixels around 0.5, so that small changes do not reach black or white."""
    return (0.5 + spread * (rand(count, 3, size, size) - 0.5)).float()


def naive_pgd(network, ball, steps, image, label, start):
    """Return the changed image and whether it withstands: projected gradient ascent for one image."""
    changed = start
    for step in range(steps + 1):
        changed = changed.detach().requires_grad_()
        logits = network(changed[None])[0]
        if logits.argmax() != label or step == steps:
            return changed.detach(), bool(logits.argmax() == label)
        (-logits.log_softmax(0)[label]).backward()
        gradient, size = changed.grad, 2.5 * ball.eps / steps
        if ball.norm == "Linf":
            moved = changed.detach() + size * gradient / gradient.abs().clamp_min(1e-30)
            lower, upper = (image - ball.eps).clamp_min(0), (image + ball.eps).clamp_max(1)
            changed = torch.minimum(torch.maximum(moved, lower), upper)
        else:
            change = changed.detach() + size * gradient / gradient.square().sum().sqrt() - image
            length = change.square().sum().sqrt()
            changed = (image + (change if length <= ball.eps else change * ball.eps / length)).clamp(0, 1)


@pytest.mark.parametrize("ball", [Ball("Linf", 0.03), Ball("L2", 0.3)], ids=lambda ball: ball.norm)
def test_pgd_equals_a_loop_over_single_images(ball):
    network, images = Convolutional(), rand(40, 3, 8, 8)
    labels = network(images).argmax(1)
    starts = ball.sample(images, generator(3, 0, "start"))
    changed, withstood = pgd(network, ball, images, labels, generator(3, 0, "start"), 20)
    expected = [naive_pgd(network, ball, 20, *parts) for parts in zip(images, labels, starts, strict=True)]
    assert withstood.tolist() == [stands for _, stands in expected]
    assert 5 < withstood.sum() < 35
    losses, naive = (
        F.cross_entropy(network(part), labels, reduction="none").tolist()
        for part in (changed, torch.stack([image for image, _ in expected]))
    )
    assert losses == pytest.approx(naive, rel=1e-3)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_finds_the_strongest_attack_on_a_linear_network(norm):
    network, images = Linear(), gray(60)
    labels = network(images).argmax(1)
    limits = network.margins(images, labels, norm)
    ball = Ball(norm, limits.median().item())
    changed, withstood = pgd(network, ball, images, labels, generator(0, 0, ""), 50)
    # 50 steps from a random start do not reach the strongest attack exactly
    clear = (limits / ball.eps - 1).abs() > 0.02
    assert torch.equal(withstood[clear], (limits > ball.eps)[clear])
    assert 20 < withstood.sum() < 40
    # the strongest attack within eps leaves this margin
    left = network.margins(changed, labels, norm)[withstood]
    assert left.tolist() == pytest.approx((limits - ball.eps)[withstood].tolist(), abs=0.02 * ball.eps)


@pytest.mark.parametrize(
    "ball", [LINF, L2, Ball("L2", 0.01), Ball("Linf", 1.0)], ids=lambda ball: f"{ball.norm} {ball.eps:.2f}"
)
def test_projection_and_random_starts_stay_in_the_ball(ball):
    images, far = rand(30, 3, 8, 8), rand(30, 3, 8, 8, seed=1) * 3 - 1
    projected, order = ball.project(far, images), {"Linf": torch.inf, "L2": 2}[ball.norm]
    for changed in (projected, ball.sample(images, generator(0, 0, ""))):
        assert 0 <= changed.min() <= changed.max() <= 1
        lengths = torch.linalg.vector_norm((changed - images).flatten(1), order, dim=1)
        assert lengths.max() <= ball.eps * (1 + 1e-6)
        assert lengths.max() > ball.eps / 2
    inside = images + 0.99 * (projected - images)
    torch.testing.assert_close(ball.project(inside, images), inside)


def test_pgd_starts_anew_only_for_images_that_withstand():
    seen = []

    def attack(images, labels, random):
        seen.append(images[:, 0, 0, 0].tolist())
        return images + random.initial_seed() % 7, (images[:, 0, 0, 0] * 10).round() % 2 == len(seen) % 2

    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2) / 10
    labels, correct = torch.zeros(5, dtype=torch.int64), torch.arange(5) < 4
    config = SimpleNamespace(seed=0, attack_restarts=3)
    changed, withstood = adversarial.run(attack, images, labels, correct, "", config)
    assert seen[0] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert seen[1] == pytest.approx([0.1, 0.3])
    assert sum(map(len, seen)) == 6
    assert not withstood.any()
    added = [generator(0, restart, "").initial_seed() % 7 for restart in (0, 1, 0, 1)]
    torch.testing.assert_close(changed, images + torch.tensor([*added, 0])[:, None, None, None])
    assert correct.sum() == 4


def test_square_attack_stays_in_the_ball_and_is_no_stronger_than_the_strongest_attack():
    network, images = Linear(), gray(80)
    # each channel has one weight, so that squares of one color are strong attacks
    network.weight.data = network.weight.data.view(2, 3, 64).mean(2, keepdim=True).expand(2, 3, 64).reshape(2, -1)
    labels = network(images).argmax(1)
    limits = network.margins(images, labels, "Linf")
    eps = limits.median().item()
    changed, withstood = square(network, Ball("Linf", eps), images, labels, generator(0, 0, ""))
    assert (changed - images).abs().max() <= eps * (1 + 1e-5)
    assert torch.equal(withstood, network(changed).argmax(1) == labels)
    assert withstood[limits > eps * 1.001].all()
    assert not withstood[limits < eps * 0.5].any()
    bright = square(network, Ball("Linf", 0.7), images, labels, generator(0, 0, ""))[0]
    assert 0 <= bright.min() < 0.01
    assert 0.99 < bright.max() <= 1


class TwoClasses(Coloured):
    """Sixty test images in the order of their logits' difference; the labels of the last five are wrong."""

    def read(self):
        source = super().read()
        source.class_names = ["low", "high"]
        low, high = Linear().weight.detach()
        images = 0.5 + torch.linspace(-0.17, 0.165, 60)[:, None] * (high - low)
        images = (255 * images).round().to(torch.uint8).view(60, 3, 8, 8)
        split = Split(images, torch.tensor([0] * 30 + [1] * 25 + [0] * 5))
        return replace(source, train=split, test=split, val=split)


def attacked(network=None, *settings):
    record, figures = measure(TwoClasses, network=network or Linear(), settings=["attack=pgd", *settings])
    return record["adversarial"], figures


def test_record_of_a_linear_network():
    record, figures = attacked()
    data = TwoClasses(batch_size=2)
    images, labels = data.source.test.images / 255, data.source.test.labels
    assert record["accuracy"]["no attack"]["accuracy"] == pytest.approx(55 / 60)
    correct = Linear()(images).argmax(1) == labels
    for title, ball in BALLS.items():
        row = record["accuracy"][title]
        limits = Linear().margins(images[correct], labels[correct], ball.norm)
        assert ((limits / ball.eps - 1).abs() > 0.02).all()  # the result is clear for each image
        assert row["accuracy"] == (limits > ball.eps).sum() / 60
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert 0.1 < row["accuracy"] < 0.8
    assert list(record["accuracy"]) == ["no attack", *BALLS]
    count = round(60 * record["accuracy"]["PGD L∞ 8/255"]["accuracy"])
    names = "PGD with 100 steps", "Square Attack with 500 queries"
    assert record["checks"] == {key: {"images": count, "fooled": 0, "is_sign": False} for key in names}
    # eight test images that the attack fools, each followed by its changed image
    (axis,) = figures["adversarial"].axes
    pairs = torch.stack([torch.tensor(np.array(image.get_array())) for image in axis.images]).permute(0, 3, 1, 2)
    (shown,) = (pairs[::2, None] == data.source.test.images).flatten(2).all(2).any(0).nonzero(as_tuple=True)
    assert len(shown) == 8
    limits = Linear().margins(images, labels, "Linf")[shown]
    assert ((limits > 0) & (limits < LINF.eps)).all()
    assert 7 <= (pairs[1::2].int() - pairs[::2].int()).abs().max() <= 8
    assert [text.get_color() for text in axis.texts[:-1]] == [RIGHT, WRONG] * 8


class Masked(Linear):
    """A linear network of pixels with 4 bits, which has no gradient."""

    def forward(self, images):
        images = images / 255 if images.dtype == torch.uint8 else images
        return super().forward((15 * images).round() / 15 + 0 * images)


def test_gradient_masking_is_detected():
    record, _ = attacked(Masked())
    plain, _ = attacked()
    masked = record["accuracy"]["PGD L∞ 8/255"]["accuracy"]
    assert masked > plain["accuracy"]["PGD L∞ 8/255"]["accuracy"] + 0.2  # looks robust
    check = record["checks"]["Square Attack with 500 queries"]
    assert check["images"] == round(60 * masked)
    assert 2 <= check["fooled"] <= check["images"]
    assert check["is_sign"]


@pytest.mark.parametrize(("by_steps", "by_square", "is_sign"), [(0, 1, False), (1, 2, True)])
def test_numbers_of_images_that_are_a_sign_of_gradient_masking(monkeypatch, by_steps, by_square, is_sign):
    """More than 1% of the 60 images for more steps, and more than 3% for Square Attack."""

    def attack(network, ball, images, labels, random, steps=0):
        return images, torch.arange(len(images)) >= {0: by_square, 50: 0, 100: by_steps}[steps]

    monkeypatch.setattr(adversarial, "pgd", attack)
    monkeypatch.setattr(adversarial, "square", attack)
    checks = attacked()[0]["checks"].values()
    assert [row["fooled"] for row in checks] == [by_steps, by_square]
    assert [row["is_sign"] for row in checks] == [is_sign, is_sign]


def test_images_are_taken_at_regular_intervals(monkeypatch):
    data = TwoClasses(batch_size=2)
    seen = []

    def attack(network, ball, images, labels, random, steps):
        seen.append((images, labels))
        return images, labels >= 0

    monkeypatch.setattr(adversarial, "pgd", attack)
    record, figures = attacked(None, "attack_images=7")
    assert record["accuracy"]["no attack"]["images"] == 7
    test = data.source.test
    expected = test[test.labels.argsort(stable=True)[::9]]
    torch.testing.assert_close(seen[0][0], expected.images / 255)
    assert seen[0][1].tolist() == expected.labels.tolist() == [0] * 4 + [1] * 3
    assert record["accuracy"]["PGD L2 0.5"]["accuracy"] == 1
    assert [text.get_color() for text in figures["adversarial"].axes[0].texts[:-1]] == [RIGHT] * 14  # none is fooled


def test_a_sample_contains_the_same_fraction_of_each_class():
    labels = torch.arange(200) % 10  # every 20th label is 0
    images, classes = sample(Split(torch.arange(200)[:, None], labels), 20)
    assert classes == [label for label in range(10) for _ in range(2)]
    assert labels[images.flatten()].tolist() == classes


def test_a_network_that_is_always_wrong():
    network = Linear()
    network.weight.data *= -1
    record, _ = attacked(network)
    assert record["accuracy"]["no attack"]["accuracy"] == pytest.approx(5 / 60)

    class Wrong(TwoClasses):
        def read(self):
            source = super().read()
            source.test.labels[:] = 1 - Linear()(source.test.images).argmax(1)
            return source

    record = measure(Wrong, network=Linear(), settings=["attack=pgd"])[0]["adversarial"]
    assert [row["accuracy"] for row in record["accuracy"].values()] == [0, 0, 0]
    assert [row["fooled"] for row in record["checks"].values()] == [0, 0]


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
def test_autoattack_finds_the_strongest_attack_on_a_linear_network(ball):
    """All other classes are targets, although AutoAttack's standard version has nine."""
    network, images = Linear(5), gray(60)
    labels = network(images).argmax(1)
    limits = network.margins(images, labels, ball.norm)
    images = images[limits.argsort()[::6]]
    labels, limits = network(images).argmax(1), limits.sort().values[::6]
    ball = Ball(ball.norm, (limits[-2] + limits[-1]).item() / 2)  # one image withstands
    changed, withstood = autoattack(network, ball, images, labels, generator(0, 0, ""))
    assert withstood.tolist() == (limits > ball.eps).tolist()
    assert torch.equal(withstood, network(changed).argmax(1) == labels)


def test_autoattack_is_silent(capfd):
    """It warns of probabilities in place of logits."""
    network, images = nn.Sequential(Linear(5), nn.Softmax(1)), gray(4)
    autoattack(network, Ball("Linf", 0.5), images, network(images).argmax(1), generator(0, 0, ""))
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_reported_before_anything_runs(run, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    status, printed, error = command(str(run), "attack=autoattack", f"output_dir={tmp_path}/out", main=main)
    assert (status, printed, error.count("\n")) == (1, "", 1)
    assert "pip install 'cifarnet[attack]'" in error
    assert not (tmp_path / "out").exists()


def test_autoattack_needs_four_classes(run, tmp_path, monkeypatch):
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "frog")):
            picture(tmp_path / "pictures" / split / name / "a.png", (80 * number, 9, 9))
    monkeypatch.setattr(Checkpoint, "check_task", lambda *_: None)
    monkeypatch.setattr(Predictor, "predict_all", None)  # it is refused before anything is computed
    with pytest.raises(UserError, match=r"^attack=autoattack needs at least 4 classes, but there are 3\. Use"):
        evaluate(run, ["attack=autoattack", "data=folder", f"data.root={tmp_path}/pictures", "data.val_fraction=0"])


@pytest.mark.parametrize("setting", ["attack=fgsm", "attack_images=0", "attack_steps=0", "attack_restarts=0"])
def test_settings(run, setting):
    with pytest.raises(UserError, match=setting):
        evaluate(run, ["corruptions=false", setting])


@pytest.mark.parametrize(("name", "attack", "count"), [("PGD", "pgd", 30), ("AutoAttack", "autoattack", 4)])
def test_the_command_reports_it(run, command, tmp_path, name, attack, count):
    settings = ["corruptions=false", f"attack={attack}", f"attack_images={count}", "attack_steps=5"]
    settings.append("attack_restarts=2")
    status, printed, error = command(str(run), *settings, f"output_dir={tmp_path}/out", main=main)
    assert status == 0, error
    record = json.loads((tmp_path / "out/metrics.json").read_text())["adversarial"]
    assert list(record["accuracy"]) == ["no attack", f"{name} L∞ 8/255", f"{name} L2 0.5"]
    for title, row in record["accuracy"].items():
        assert row["images"] == count
        assert row["accuracy"] <= record["accuracy"]["no attack"]["accuracy"]
        assert title in printed
    assert "gradient masking  " in printed
    page = (tmp_path / "out/report.html").read_text()
    assert f"The attack is {name}" in page
    assert ("5 steps and 2 random starts" in " ".join(page.split())) == (attack == "pgd")
    # in float32 and without augmentation, for any precision and augmentation of the evaluation; the same every time
    settings += ["precision=bf16-mixed", "tta=none", f"output_dir={tmp_path}/other"]
    assert evaluate(run, settings)["adversarial"] == record
