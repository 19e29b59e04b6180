"""Adversarial accuracy: the accuracy on images that an attack has changed within a small distance."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from cifarnet.evaluation import metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference.figures import predictions
from cifarnet.inference.predictor import Predictor
from cifarnet.inference.test_images import sample
from cifarnet.seeding import generator

BATCH = 100  # the number of images that are attacked at a time
EXAMPLES = 8  # the number of images in the figure
QUERIES = 500  # the number of queries of the Square Attack
HALVED = (0.5, 2.5, 10, 25, 50, 100, 200, 300, 400)  # the queries after which the Square Attack halves its area

Result = tuple[Tensor, Tensor]  # changed images, and whether each is still classified correctly, bool [B]
Attack = Callable[[Tensor, Tensor, Generator], Result]  # takes images, float [B, C, H, W] from 0 to 1, and labels


class Ball(NamedTuple):
    """The images [B, C, H, W], with pixels from 0 to 1, within a distance of given images."""

    norm: Literal["Linf", "L2"]
    eps: float

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
        """Return the changed images, projected onto the ball around `images` and then onto the range of pixels."""
        change = changed - images
        change = change.clamp(-self.eps, self.eps) if self.norm == "Linf" else change.renorm(2, 0, self.eps)
        return (images + change).clamp(0, 1)


LINF, L2 = Ball("Linf", 8 / 255), Ball("L2", 0.5)  # those of RobustBench for CIFAR-10


def section(subject: Subject) -> Section:
    """Return the accuracy on changed test images in each ball, signs of gradient masking, and examples.

    Gradient masking means that misleading gradients weaken an attack (Athalye et al., 2018,
    https://arxiv.org/abs/1802.00420; Carlini et al., 2019, https://arxiv.org/abs/1902.06705). A sign of it is that many
    of the images that withstood the attack in the L∞ ball are fooled by another attack.
    """
    config, predictor, steps = subject.config, subject.predictor, subject.config.attack_steps
    if config.attack is None:
        return None, {}
    assert isinstance(predictor, Predictor)  # `ensemble.check` refuses `attack` for an ensemble
    # in float32, without the precision and the augmentation of the predictor
    network = copy.deepcopy(predictor.network.module).float().requires_grad_(False)
    pixels, classes = sample(subject.data.source.test, config.attack_images)
    images, labels = pixels.to(predictor.device) / 255, torch.tensor(classes, device=predictor.device)
    correct = torch.cat([network(part).argmax(1) for part in images.split(BATCH)]) == labels
    name, attack = ("PGD", partial(pgd, steps=steps)) if config.attack == "pgd" else ("AutoAttack", autoattack)
    results = {"no attack": (images, correct)}
    for title, ball in {f"{name} L∞ 8/255": LINF, f"{name} L2 0.5": L2}.items():
        results[title] = run(partial(attack, network, ball), images, labels, correct, title, config)
    accuracy = {title: metrics.proportion(int(right.sum()), len(labels)) for title, (_, right) in results.items()}
    changed, withstood = results[f"{name} L∞ 8/255"]
    checks, count = {}, int(withstood.sum())
    # with the share of the images that each may fool without gradient masking; Square Attack may fool more, because its
    # loss is the margin instead of the cross-entropy
    for title, other, share in (
        (f"PGD with {2 * steps} steps", partial(pgd, network, LINF, steps=2 * steps), 0.01),
        (f"Square Attack with {QUERIES} queries", partial(square, network, LINF), 0.03),
    ):
        fooled = count - int(run(other, images, labels, withstood, title, config)[1].sum())
        checks[title] = {"images": count, "fooled": fooled, "is_sign": fooled > share * len(labels)}
    order = torch.rand(len(labels), generator=generator(config.seed, 0, "examples")).to(labels.device)
    shown = (order + (correct & ~withstood)).argsort(descending=True)[:EXAMPLES]  # if possible, those that are fooled
    pairs = torch.stack([images[shown], changed[shown]], 1).flatten(0, 1)
    pixels, truth = (255 * pairs).round().byte().cpu(), labels[shown].repeat_interleave(2)
    title = "Test images before and after the attack"
    figure = predictions(pixels, truth, network(pairs).argmax(1), subject.data.class_names, title)
    return {"attack": name, "accuracy": accuracy, "checks": checks}, {"adversarial": figure}


def run(attack: Attack, images: Tensor, labels: Tensor, correct: Tensor, title: str, config: Any) -> Result:
    """Attack the images that are classified correctly, in batches, from `attack_restarts` random starts.

    Args:
        correct: whether each image is classified correctly, bool [N].
        config: the settings in `configs/evaluate.yaml`.
    """
    changed, withstood = images.clone(), correct.clone()
    for restart in range(config.attack_restarts):
        random = generator(config.seed, restart, title)
        left = withstood.nonzero().flatten()
        for index in tqdm(left.split(BATCH) if len(left) else [], title, leave=False, disable=None):
            changed[index], withstood[index] = attack(images[index], labels[index], random)
    return changed, withstood


def pgd(network: nn.Module, ball: Ball, images: Tensor, labels: Tensor, random: Generator, steps: int) -> Result:
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


def square(network: nn.Module, ball: Ball, images: Tensor, labels: Tensor, random: Generator) -> Result:
    """Square Attack for L∞ (Andriushchenko et al., 2020, https://arxiv.org/abs/1912.00049), a random search without
    gradients: keep a colored square if it reduces the margin, which is the logit of the label minus the largest other.
    """
    count, channels, _, size = images.shape
    stripes = 2 * torch.randint(2, (count, channels, 1, size), generator=random).to(images) - 1
    changed, margin = (images + ball.eps * stripes).clamp(0, 1), torch.full_like(images[:, 0, 0, 0], torch.inf)
    for query in range(QUERIES):
        area = 0.8 / 2 ** sum(query > halved for halved in HALVED)
        side = max(1, round(area**0.5 * size))
        top, left = torch.randint(size + 1 - side, (2,), generator=random).tolist()
        inside = (..., slice(top, top + side), slice(left, left + side))
        color = 2 * torch.randint(2, (channels, 1, 1), generator=random).to(images) - 1
        candidate = changed.clone()
        candidate[inside] = (images[inside] + ball.eps * color).clamp(0, 1)
        logits, label = network(candidate), labels[:, None]
        found = logits.gather(1, label)[:, 0] - logits.scatter(1, label, -torch.inf).amax(1)
        better = found < margin
        changed[better], margin[better] = candidate[better], found[better]
    return changed, margin >= 0


def autoattack(network: nn.Module, ball: Ball, images: Tensor, labels: Tensor, random: Generator) -> Result:
    """The standard version of AutoAttack, with as many target classes as there are, but at most nine (Croce and Hein,
    2020, https://arxiv.org/abs/2003.01690). It needs at least four classes."""
    from pyautoattack import AutoAttack

    attack: Any = AutoAttack(network, norm=ball.norm, eps=ball.eps, seed=random.initial_seed(), device=images.device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, network(images[:1]).shape[1] - 1)
    attack.logger.disabled = True  # `section` looks for what its warnings are about
    changed, predicted = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    return changed, predicted == labels
