"""Adversarial accuracy: the accuracy on images that an attack has changed within a small distance."""

import copy
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from cifarnet.errors import UserError
from cifarnet.evaluation import metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference.figures import WRONG, grid
from cifarnet.seeding import generator

BATCH = 100  # the number of images that are attacked at a time
EXAMPLES = 4  # the number of images in the figure, for each norm
QUERIES = 500  # the number of queries of the Square Attack
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # when the Square Attack halves its area, of 10,000 queries
FEW = 0.01  # the share of the images that PGD with more steps may also fool without a sign of gradient masking

Result = tuple[Tensor, Tensor]  # changed images, and whether each is still classified correctly, bool [B]
Attack = Callable[[Tensor, Tensor, Generator], Result]  # takes images, float [B, C, H, W] from 0 to 1, and labels


class Ball(NamedTuple):
    """The images [B, C, H, W], with pixels from 0 to 1, within a distance of given images."""

    norm: Literal["Linf", "L2"]
    eps: float

    def __str__(self) -> str:
        return f"L∞ {255 * self.eps:g}/255" if self.norm == "Linf" else f"L2 {self.eps:g}"

    def sample(self, images: Tensor, random: Generator) -> Tensor:
        """Return random images: for L∞, each change is uniform; for L2, the direction and the distance are random."""
        change = 2 * torch.rand(images.shape, generator=random) - 1
        if self.norm == "L2":
            change = self.step(change) * torch.rand(len(images), 1, 1, 1, generator=random)
        return (images + self.eps * change.to(images.device)).clamp(0, 1)

    def step(self, gradient: Tensor) -> Tensor:
        """Return the change with norm 1 that increases the loss most, to first order."""
        return gradient.sign() if self.norm == "Linf" else F.normalize(gradient.flatten(1)).view_as(gradient)

    def project(self, changed: Tensor, images: Tensor) -> Tensor:
        """Return the nearest images in the ball around `images`."""
        change = changed - images
        change = change.clamp(-self.eps, self.eps) if self.norm == "Linf" else change.renorm(2, 0, self.eps)
        return (images + change).clamp(0, 1)


BALLS = (Ball("Linf", 8 / 255), Ball("L2", 0.5))  # those of RobustBench for CIFAR-10


def check(attack: str | None, num_classes: int) -> None:
    """Check that an attack can be used.

    Raises:
        UserError: there are too few classes.
        ModuleNotFoundError: a package is not installed.
    """
    if attack == "autoattack":
        import pyautoattack  # noqa: F401

        if num_classes < 4:  # a loss compares four logits
            raise UserError(f"attack=autoattack needs at least 4 classes, but there are {num_classes}. Use attack=pgd.")


def section(subject: Subject) -> Section:
    """Return the accuracy on changed test images in each ball, signs of gradient masking, and examples."""
    config, test, names = subject.config, subject.data.source.test, subject.data.class_names
    if config.attack is None:
        return None, {}
    # in float32, without the precision and the augmentation of the predictor
    network = copy.deepcopy(subject.predictor.network.module).float().requires_grad_(False)
    chosen = test[_regular(len(test), config.attack_images)]
    images = (torch.cat(list(chosen.chunks())).float() / 255).to(subject.predictor.device)
    labels = chosen.labels.to(images.device)
    correct = torch.cat([network(part).argmax(1) for part in images.split(BATCH)]) == labels
    images, labels, total = images[correct], labels[correct], len(labels)
    name, steps = {"pgd": "PGD", "autoattack": "AutoAttack"}[config.attack], config.attack_steps
    record: dict[str, Any] = {"attack": name, "steps": steps, "restarts": config.attack_restarts}
    record |= {"clean": metrics.proportion(len(labels), total), "balls": {}, "checks": {}, "warnings": []}
    pictures, captions = [], []
    for ball in BALLS:
        start, title = time.perf_counter(), f"{name} {ball}"
        attack = partial(autoattack, network, ball) if name == "AutoAttack" else partial(pgd, network, ball, steps)
        changed, withstood = run(attack, images, labels, title, config.seed, config.attack_restarts)
        part = metrics.proportion(int(withstood.sum()), total)
        record["balls"][str(ball)] = {**part, "eps": ball.eps, "seconds": time.perf_counter() - start}
        if ball.norm == "Linf":
            checks(network, ball, images[withstood], labels[withstood], config, record)
        fooled = (~withstood).nonzero().flatten()
        shown = fooled[_regular(len(fooled), EXAMPLES)]
        for image, found, label in zip(images[shown], changed[shown], labels[shown], strict=True):
            factor = 0.5 / (found - image).abs().max()
            pictures += [image, 0.5 + factor * (found - image), found]
            captions += [(names[label], "black"), (f"{ball}, ×{factor:.0f}", "black")]
            captions += [(names[network(found[None]).argmax()], WRONG)]
    pixels = [(255 * picture).round().to(torch.uint8).cpu() for picture in pictures]
    title = "Images, their changes (amplified) and the new predictions"
    return record, {"adversarial": grid(pixels, captions, title, columns=6)} if pixels else {}


def run(attack: Attack, images: Tensor, labels: Tensor, title: str, seed: int, restarts: int = 1) -> Result:
    """Attack images in batches; those that are misclassified are left out of the next restarts."""
    changed, withstood = images.clone(), torch.ones_like(labels, dtype=torch.bool)
    for restart in range(restarts):
        random = generator(seed, restart, title)
        left = withstood.nonzero().flatten()
        for index in tqdm(left.split(BATCH) if len(left) else [], title, leave=False, disable=None):
            changed[index], withstood[index] = attack(images[index], labels[index], random)
    return changed, withstood


def pgd(network: nn.Module, ball: Ball, steps: int, images: Tensor, labels: Tensor, random: Generator) -> Result:
    """Maximize the cross-entropy by projected gradient ascent from a random start (PGD, Madry et al., 2018,
    https://arxiv.org/abs/1706.06083). Once an image is misclassified, it is not changed any more."""
    changed, withstood = ball.sample(images, random), torch.ones_like(labels, dtype=torch.bool)
    for step in range(steps + 1):  # the last pass only tests the images
        index = withstood.nonzero().flatten()
        if len(index) == 0:
            break
        current = changed[index].requires_grad_()
        logits = network(current)
        withstood[index] = logits.argmax(1) == labels[index]
        if step < steps:
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels[index], reduction="sum"), [current])
            moved = ball.project(current.detach() + 2.5 * ball.eps / steps * ball.step(gradient), images[index])
            changed[withstood] = moved[withstood[index]]
    return changed, withstood


@torch.no_grad()
def square(network: nn.Module, eps: float, queries: int, images: Tensor, labels: Tensor, random: Generator) -> Result:
    """Square Attack for L∞ (Andriushchenko et al., 2020, https://arxiv.org/abs/1912.00049), a random search without
    gradients: keep a colored square if it reduces the margin, which is the logit of the label minus the largest other.
    """
    count, channels, _, size = images.shape
    stripes = 2 * torch.randint(2, (count, channels, 1, size), generator=random).to(images) - 1
    changed, margin = (images + eps * stripes).clamp(0, 1), torch.full((count,), torch.inf, device=images.device)
    for query in range(queries):
        index = (margin >= 0).nonzero().flatten()
        if len(index) == 0:
            break
        area = 0.8 / 2 ** sum(10_000 * query > queries * halved for halved in HALVED)
        side = max(1, round(area**0.5 * size))
        top, left = torch.randint(size + 1 - side, (2,), generator=random).tolist()
        inside = (..., slice(top, top + side), slice(left, left + side))
        color = 2 * torch.randint(2, (channels, 1, 1), generator=random).to(images) - 1
        candidate, label = changed[index], labels[index, None]
        candidate[inside] = (images[index][inside] + eps * color).clamp(0, 1)
        logits = network(candidate)
        found = logits.gather(1, label)[:, 0] - logits.scatter(1, label, -torch.inf).amax(1)
        better = found < margin[index]
        changed[index[better]], margin[index[better]] = candidate[better], found[better]
    return changed, margin >= 0


def checks(network: nn.Module, ball: Ball, images: Tensor, labels: Tensor, config: Any, record: dict[str, Any]) -> None:
    """Record how many of the images that withstood the attack are fooled by other attacks, and the warnings that
    misleading gradients weakened it (gradient masking, Athalye et al., 2018, https://arxiv.org/abs/1802.00420; Carlini
    et al., 2019, https://arxiv.org/abs/1902.06705)."""
    steps, unlimited = config.attack_steps, Ball("Linf", 1.0)
    count, few = len(labels), max(1, FEW * record["clean"]["images"])
    # with the numbers of images that each should fool; Square Attack may find more because it uses another loss
    for name, attack, least, most in (
        (f"PGD with {2 * steps} steps", partial(pgd, network, ball, 2 * steps), 0, few),
        (f"Square Attack with {QUERIES} queries", partial(square, network, ball.eps, QUERIES), 0, 3 * few),
        ("PGD without a limit", partial(pgd, network, unlimited, steps), count, count),
    ):
        fooled = count - int(run(attack, images, labels, name, config.seed)[1].sum())
        record["checks"][name] = {"images": count, "fooled": fooled}
        if not least <= fooled <= most:
            record["warnings"].append(f"{name} fools {fooled} of the {count} images that withstand {record['attack']}.")


def autoattack(network: nn.Module, ball: Ball, images: Tensor, labels: Tensor, random: Generator) -> Result:
    """The standard version of AutoAttack, with as many target classes as there are, but at most nine (Croce and Hein,
    2020, https://arxiv.org/abs/2003.01690)."""
    from pyautoattack import AutoAttack

    attack: Any = AutoAttack(network, norm=ball.norm, eps=ball.eps, seed=random.initial_seed(), device=images.device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, network(images[:1]).shape[1] - 1)
    silent = logging.Logger("AutoAttack", logging.CRITICAL)  # `checks` looks for what its warnings are about
    attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = silent
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        changed, predicted = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    return changed, predicted == labels


def _regular(count: int, most: int) -> Tensor:
    """Return at most `most` of the numbers below `count`, at regular intervals."""
    return torch.arange(min(count, most)) * count // max(1, min(count, most))
