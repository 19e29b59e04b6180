import pytest
import torch
import torch.nn.functional as F

from cifarnet.models.tta import AveragedLogits


class Linear(torch.nn.Module):
    """Logits that depend on the position of each pixel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3 * 8 * 8, 4, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return images.float().flatten(1) @ self.weight / 1000


def predict(network, images, tta="mirror_translate", share=1.0, batch_size=20):
    """Return the logits of the images themselves, and the final ones."""
    batches = images.split(batch_size)
    averaged_logits = AveragedLogits(network, len(batches), tta, share)
    return torch.cat([averaged_logits.add(batch) for batch in batches]), torch.cat(averaged_logits.final())


@pytest.fixture
def images():
    return torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def views(images):
    """Yield weight and view of mirror_translate, computed by padding."""
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, :8, :8], padded[:, :, 2:, 2:]]
    for weight, view in [(0.25, images.float()), *((0.125, view) for view in shifted)]:
        yield weight, view
        yield weight, view.flip(3)


def test_views_have_the_documented_weights(images):
    network = Linear()
    plain, averaged = predict(network, images, "mirror_translate")
    assert torch.equal(plain, network(images))
    torch.testing.assert_close(averaged, sum(weight * network(view) for weight, view in views(images)))
    _, mirrored = predict(network, images, "mirror")
    torch.testing.assert_close(mirrored, (network(images) + network(images.flip(3))) / 2)
    assert torch.equal(*predict(network, images, "none"))
    assert torch.equal(*predict(network, images, share=0))
    default = AveragedLogits(network, 1)  # mirror_translate for all images
    default.add(images)
    assert torch.equal(torch.cat(default.final()), averaged)


def test_only_the_least_confident_images_are_averaged(images):
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
def test_averaged_images_do_not_depend_on_the_batch_size(images, batch_size, share):
    images = torch.cat([images, images.flip(2), images[:7]])  # some are equally confident
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(2))]
    single, expected = predict(Linear(), images, share=share, batch_size=len(images))
    assert (single != expected).any(1).sum() == -(-share * len(images) // 1)
    both = predict(Linear(), images, share=share, batch_size=batch_size)
    torch.testing.assert_close(both, (single, expected))


def test_few_candidates_are_kept(images):
    averaged_logits = AveragedLogits(Linear(), 100, share=0.05)
    for _ in range(100):
        averaged_logits.add(images)
        assert sum(len(kept) for *_, kept in averaged_logits._candidates) <= 2 * 0.05 * 100 * 20 + 20
    assert len(torch.cat(averaged_logits.final())) == 2000


@pytest.mark.parametrize("share", [0.5, 1])
def test_logits_are_on_the_device(images, share):
    """Tensors on the meta device cannot be combined with others."""
    averaged_logits = AveragedLogits(lambda images: images.float().mean((2, 3)), 2, share=share)
    for batch in images.to("meta").split(10):
        averaged_logits.add(batch)
    assert {place.device.type for _, place, _ in averaged_logits._candidates} <= {"meta"}
    assert {logits.device.type for logits in averaged_logits.final()} == {"meta"}
