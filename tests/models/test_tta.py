import pytest
import torch
import torch.nn.functional as F

from cifarnet.models.tta import AveragedLogits


class Linear(torch.nn.Module):
    """Logits that tell where each pixel was."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3 * 8 * 8, 4, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return images.float().flatten(1) @ self.weight / 1000


def predict(network, images, tta="mirror_translate", share=1.0, batch_size=20):
    """Logits of one view, and the last word."""
    batches = images.split(batch_size)
    answers = AveragedLogits(network, len(batches), tta, share)
    return torch.cat([answers.add(batch) for batch in batches]), torch.cat(answers.final())


@pytest.fixture
def images():
    return torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def views(images):
    """(weight, view) of mirror_translate, by padding."""
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, :8, :8], padded[:, :, 2:, 2:]]
    for weight, view in [(0.25, images.float()), *((0.125, view) for view in shifted)]:
        yield weight, view
        yield weight, view.flip(3)


def test_views_are_weighed_as_described(images):
    network = Linear()
    plain, averaged = predict(network, images, "mirror_translate")
    assert torch.equal(plain, network(images))
    torch.testing.assert_close(averaged, sum(weight * network(view) for weight, view in views(images)))
    _, mirrored = predict(network, images, "mirror")
    torch.testing.assert_close(mirrored, (network(images) + network(images.flip(3))) / 2)
    assert torch.equal(*predict(network, images, "none"))
    assert torch.equal(*predict(network, images, share=0))
    usual = AveragedLogits(network, 1)  # all, mirrored and shifted
    usual.add(images)
    assert torch.equal(torch.cat(usual.final()), averaged)


def test_only_the_least_confident_are_looked_at_again(images):
    network = Linear()
    plain, averaged = predict(network, images, "mirror_translate", share=0.25)
    changed = (plain != averaged).any(1)
    assert changed.sum() == 5
    confidence = plain.softmax(1).amax(1)
    assert confidence[changed].max() <= confidence[~changed].min()
    _, everything = predict(network, images, "mirror_translate")
    torch.testing.assert_close(averaged[changed], everything[changed])


@pytest.mark.parametrize("share", [0.04, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 50])
def test_who_is_looked_at_again_does_not_depend_on_the_batch_size(images, batch_size, share):
    images = torch.cat([images, images.flip(2), images[:7]])  # some are equally confident
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(2))]
    one_view, expected = predict(Linear(), images, share=share, batch_size=len(images))
    assert (one_view != expected).any(1).sum() == -(-share * len(images) // 1)
    both = predict(Linear(), images, share=share, batch_size=batch_size)
    torch.testing.assert_close(both, (one_view, expected))


def test_few_images_are_kept(images):
    answers = AveragedLogits(Linear(), 100, share=0.05)
    for _ in range(100):
        answers.add(images)
        assert sum(len(kept) for *_, kept in answers._candidates) <= 2 * 0.05 * 100 * 20 + 20
    assert len(torch.cat(answers.final())) == 2000


@pytest.mark.parametrize("share", [0.5, 1])
def test_answers_lie_on_the_device(images, share):
    """Told by one that holds no numbers, and does not mix with others."""
    answers = AveragedLogits(lambda images: images.float().mean((2, 3)), 2, share=share)
    for batch in images.to("meta").split(10):
        answers.add(batch)
    assert {place.device.type for _, place, _ in answers._candidates} <= {"meta"}
    assert {logits.device.type for logits in answers.final()} == {"meta"}
