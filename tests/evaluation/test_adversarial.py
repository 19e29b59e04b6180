"""Attacks, compared with loops over single images, and with linear networks, whose strongest attacks are known."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_sections import Coloured, measure
from torch import nn

from cifarnet.data import Split
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main
from cifarnet.evaluation import adversarial
from cifarnet.evaluation.adversarial import BALLS, Ball, autoattack, check, pgd, square
from cifarnet.seeding import generator


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


@pytest.mark.parametrize("ball", [Ball("Linf", 0.03), Ball("L2", 0.3)], ids=str)
def test_pgd_equals_a_loop_over_single_images(ball):
    network, images = Convolutional(), rand(40, 3, 8, 8)
    labels = network(images).argmax(1)
    starts = ball.sample(images, generator(3, 0, "start"))
    changed, withstood = pgd(network, ball, 20, images, labels, generator(3, 0, "start"))
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
    changed, withstood = pgd(network, ball, 50, images, labels, generator(0, 0, ""))
    clear = (
        limits / ball.eps - 1
    ).abs() > 0.02  # 50 steps from a random start do not reach the strongest attack exactly
    assert torch.equal(withstood[clear], (limits > ball.eps)[clear])
    assert 20 < withstood.sum() < 40
    # the strongest attack within eps leaves this margin
    left = network.margins(changed, labels, norm)[withstood]
    assert left.tolist() == pytest.approx((limits - ball.eps)[withstood].tolist(), abs=0.02 * ball.eps)


@pytest.mark.parametrize("ball", [*BALLS, Ball("L2", 0.01), Ball("Linf", 1.0)], ids=str)
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

    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2) / 10
    changed, withstood = adversarial.run(attack, images, torch.zeros(4, dtype=torch.int64), "", 0, restarts=3)
    assert seen[0] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert seen[1] == pytest.approx([0.1, 0.3])
    assert sum(map(len, seen)) == 6
    assert not withstood.any()
    added = [generator(0, restart, "").initial_seed() % 7 for restart in (0, 1, 0, 1)]
    torch.testing.assert_close(changed, images + torch.tensor(added)[:, None, None, None])


def test_square_attack_stays_in_the_ball_and_is_no_stronger_than_the_strongest_attack():
    network, images = Linear(), gray(80)
    # each channel has one weight, so that squares of one color are strong attacks
    network.weight.data = network.weight.data.view(2, 3, 64).mean(2, keepdim=True).expand(2, 3, 64).reshape(2, -1)
    labels = network(images).argmax(1)
    limits = network.margins(images, labels, "Linf")
    eps = limits.median().item()
    changed, withstood = square(network, eps, 200, images, labels, generator(0, 0, ""))
    assert (changed - images).abs().max() <= eps * (1 + 1e-5)
    assert torch.equal(withstood, network(changed).argmax(1) == labels)
    assert withstood[limits > eps * 1.001].all()
    assert not withstood[limits < eps * 0.5].any()
    bright = square(network, 0.7, 20, images, labels, generator(0, 0, ""))[0]
    assert 0 <= bright.min() < 0.01
    assert 0.99 < bright.max() <= 1


def test_square_attack_queries_each_image_until_it_is_misclassified():
    network, images, counts = Linear(), gray(50), []
    labels = network(images).argmax(1)

    def counting(images):
        counts.append(len(images))
        return network(images)

    eps = network.margins(images, labels, "Linf").median().item()
    withstood = square(counting, eps, 30, images, labels, generator(0, 0, ""))[1]
    assert len(counts) == 30
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 50 > counts[-1] >= withstood.sum() > 0


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
    assert record["clean"]["accuracy"] == pytest.approx(55 / 60)
    correct = Linear()(images).argmax(1) == labels
    for ball, row in zip(BALLS, record["balls"].values(), strict=True):
        limits = Linear().margins(images[correct], labels[correct], ball.norm)
        assert ((limits / ball.eps - 1).abs() > 0.02).all()  # the result is clear for each image
        assert row["accuracy"] == (limits > ball.eps).sum() / 60
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["eps"] == ball.eps
        assert 0.1 < row["accuracy"] < 0.8
    assert list(record["balls"]) == ["L∞ 8/255", "L2 0.5"]
    count = round(60 * record["balls"]["L∞ 8/255"]["accuracy"])
    assert {name: tuple(row.values()) for name, row in record["checks"].items()} == {
        "PGD with 100 steps": (count, 0),
        "Square Attack with 500 queries": (count, 0),
        "PGD without a limit": (count, count),
    }
    assert record["warnings"] == []
    assert "adversarial" in figures


class Masked(Linear):
    """A linear network of pixels with 4 bits, which has no gradient."""

    def forward(self, images):
        images = images / 255 if images.dtype == torch.uint8 else images
        return super().forward((15 * images).round() / 15 + 0 * images)


def test_gradient_masking_is_detected():
    record, _ = attacked(Masked())
    plain, _ = attacked()
    masked = record["balls"]["L∞ 8/255"]["accuracy"]
    assert masked > plain["balls"]["L∞ 8/255"]["accuracy"] + 0.2  # looks robust
    count = record["checks"]["PGD without a limit"]["images"]
    assert count == round(60 * masked)
    assert any("Square Attack" in warning and f"of the {count} images" in warning for warning in record["warnings"])
    assert any("PGD without a limit" in warning for warning in record["warnings"])


def test_images_are_taken_at_regular_intervals(monkeypatch):
    data = TwoClasses(batch_size=2)
    seen = []

    def attack(network, ball, steps, images, labels, random):
        seen.append((images, labels))
        return images, labels >= 0

    monkeypatch.setattr(adversarial, "pgd", attack)
    record, figures = attacked(None, "attack_images=7")
    assert record["clean"]["images"] == 7
    expected = data.source.test[torch.tensor([0, 8, 17, 25, 34, 42, 51])]
    torch.testing.assert_close(seen[0][0], expected.images / 255)
    assert seen[0][1].tolist() == expected.labels.tolist() == [0] * 4 + [1] * 3
    assert "adversarial" not in figures  # no image was fooled
    assert record["balls"]["L2 0.5"]["accuracy"] == 1


def test_a_network_that_is_always_wrong():
    network = Linear()
    network.weight.data *= -1
    record, _ = attacked(network)
    assert record["clean"]["accuracy"] == pytest.approx(5 / 60)

    class Wrong(TwoClasses):
        def read(self):
            source = super().read()
            source.test.labels[:] = 1 - Linear()(source.test.images).argmax(1)
            return source

    record = measure(Wrong, network=Linear(), settings=["attack=pgd"])[0]["adversarial"]
    assert record["clean"]["accuracy"] == record["balls"]["L2 0.5"]["accuracy"] == 0
    assert record["warnings"] == []


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_autoattack_finds_the_strongest_attack_on_a_linear_network(ball):
    """All other classes are targets, although AutoAttack's standard version has nine."""
    network, images = Linear(5), gray(60)
    labels = network(images).argmax(1)
    limits = network.margins(images, labels, ball.norm)
    images = images[limits.argsort()[::6]]
    labels, limits = network(images).argmax(1), limits.sort().values[::6]
    ball = Ball(ball.norm, (limits[-2] + limits[-1]).item() / 2)  # one image withstands
    state = torch.get_rng_state()
    changed, withstood = autoattack(network, ball, images, labels, generator(0, 0, ""))
    assert withstood.tolist() == (limits > ball.eps).tolist()
    assert torch.equal(withstood, network(changed).argmax(1) == labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_autoattack_is_silent(capfd):
    """It warns of probabilities in place of logits."""
    network, images = nn.Sequential(Linear(5), nn.Softmax(1)), gray(4)
    autoattack(network, Ball("Linf", 0.5), images, network(images).argmax(1), generator(0, 0, ""))
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_attacked_is_refused_before_anything_runs(run, command, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"attack=autoattack needs at least 4 classes, but there are 3.*attack=pgd"):
        check("autoattack", 3)
    check("autoattack", 4)
    check("pgd", 2)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    status, printed, error = command(str(run), "attack=autoattack", f"output_dir={tmp_path}/out", main=main)
    assert (status, printed, error.count("\n")) == (1, "", 1)
    assert "pip install 'cifarnet[attack]'" in error
    assert not (tmp_path / "out").exists()


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
    for ball, row in record["balls"].items():
        assert row["images"] == count
        assert row["accuracy"] <= record["clean"]["accuracy"]
        assert f"{name} {ball}" in printed
    page = (tmp_path / "out/report.html").read_text()
    assert f"The attack is {name}" in page
    assert ("5 steps and 2 random starts" in " ".join(page.split())) == (attack == "pgd")
    # in float32 and without augmentation, for any precision and augmentation of the evaluation; the same every time
    settings += ["precision=bf16-mixed", "tta=none", f"output_dir={tmp_path}/other"]
    other = evaluate(run, settings)["adversarial"]
    for part in (record, other):
        assert all(row.pop("seconds") > 0 for row in part["balls"].values())
    assert other == record
