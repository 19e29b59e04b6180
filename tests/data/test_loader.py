from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cifarnet.data import InMemoryLoader
from cifarnet.data.augmentation import Augment
from cifarnet.data.loader import Batch
from cifarnet.data.streaming import LazyImages, StreamingLoader
from cifarnet.data.transforms import resize
from cifarnet.seeding import generator


@pytest.fixture
def images():
    return torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8)


def loader(images, **arguments):
    arguments = dict(batch_size=8, train=True, augment=Augment(3, "random"), seed=5) | arguments
    return InMemoryLoader(images, torch.arange(len(images)), **arguments)  # each label is the image's position


def epoch(loader, number=0):
    loader.sampler.set_epoch(number)
    batches = list(loader)
    for batch in batches:
        assert torch.equal(batch.labels, batch.index)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.index for batch in batches])


@pytest.mark.parametrize("padding", [0, 1, 3, 11])
def test_crops_flips_and_holes_equal_a_naive_loop(images, padding):
    fill = torch.tensor([7, 8, 9])
    augment = Augment(padding, "random", cutout=5, fill=fill)
    augmented, index = epoch(loader(images, augment=augment), 2)
    tops, lefts, flips, holes = augment.draw(len(images), size=12, seed=5, epoch=2)
    for output, i in zip(augmented, index.tolist(), strict=True):
        padded = F.pad(images[i].float()[None], (padding,) * 4, mode="reflect")[0].to(torch.uint8)
        top, left = int(tops[i]), int(lefts[i])
        expected = padded[:, top : top + 12, left : left + 12]
        if flips[i]:
            expected = expected.flip(2)
        expected = expected.clone()
        middle_row, middle_column = holes[i].tolist()
        for row in range(middle_row - 2, middle_row + 3):
            for column in range(middle_column - 2, middle_column + 3):
                if 0 <= row < 12 and 0 <= column < 12:
                    expected[:, row, column] = fill
        assert torch.equal(output, expected)


def test_draws_cover_every_offset_and_about_half_the_flips(monkeypatch):
    top, left, flip, hole = Augment(2, "random").draw(10_000, size=32, seed=0, epoch=0)
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]
    assert 4_800 < int(flip.sum()) < 5_200
    assert hole.unique().tolist() == list(range(32))
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.zeros(count))  # it is drawn now and then
    _, _, never, _ = Augment(2, "none").draw(100, size=32, seed=0, epoch=0)
    assert not never.any()


def test_draws_equal_those_of_recorded_runs():
    """Other draws would change the results of a seed."""
    top, left, flip, hole = Augment(2, "random").draw(20, size=32, seed=3, epoch=2)
    random = generator(3, 2, "augment")
    assert torch.equal(torch.stack([top, left]), torch.randint(5, (2, 20), generator=random))
    assert torch.equal(hole, torch.randint(32, (20, 2), generator=random))
    assert torch.equal(flip, torch.rand(20, generator=random) < 0.5)
    _, _, alternating, _ = Augment(0, "alternating").draw(20, size=32, seed=3, epoch=2)
    assert torch.equal(alternating, torch.rand(20, generator=generator(3, 0, "flip")) < 0.5)


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs():
    augment = Augment(0, "alternating")
    _, _, flips, _ = zip(*(augment.draw(1_000, size=32, seed=3, epoch=epoch) for epoch in range(4)), strict=True)
    for one, next_one in pairwise(flips):
        assert torch.equal(one, ~next_one)
    assert 400 < int(flips[0].sum()) < 600  # random in the first epoch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to compare with")
def test_batches_do_not_depend_on_the_device(images):
    on_gpu, order = epoch(loader(images, device="cuda"), 1)
    on_cpu, order_on_cpu = epoch(loader(images), 1)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    assert torch.equal(order.cpu(), order_on_cpu)


def test_an_image_is_augmented_alike_in_every_batch_size(images):
    one, index_one = epoch(loader(images, batch_size=5), 1)
    other, index_other = epoch(loader(images, batch_size=25), 1)
    assert torch.equal(index_one, index_other)
    assert torch.equal(one, other)


def test_epochs_and_seeds_differ_and_repeat(images):
    first, order = epoch(loader(images), 0)
    again, order_again = epoch(loader(images), 0)
    assert torch.equal(first, again)
    assert torch.equal(order, order_again)
    for other in (epoch(loader(images), 1), epoch(loader(images, seed=6), 0)):
        assert not torch.equal(order, other[1])


def test_training_images_are_scaled_to_the_size_of_the_epoch(images):
    sized = loader(images, augment=Augment(), sizes=[6, 9])
    assert [epoch(sized, number)[0].shape[-1] for number in (0, 1, 7)] == [6, 9, 9]
    halves, index = epoch(sized, 0)
    expected = F.interpolate(images[index].float(), (6, 6), mode="bilinear", antialias=True)
    assert (halves.float() - expected).abs().max() <= 1  # rounded
    assert torch.equal(halves, F.interpolate(images[index], (6, 6), mode="bilinear", antialias=True))  # in uint8
    assert epoch(loader(images, sizes=[6], train=False))[0].shape[-1] == 12


class OnGPU(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU."""

    device = SimpleNamespace(type="cuda")


def test_images_on_a_gpu_are_scaled_as_floats(images):
    scaled = resize(images.as_subclass(OnGPU), 6).as_subclass(torch.Tensor)
    assert scaled.dtype == torch.uint8
    assert torch.equal(scaled, F.interpolate(images.float(), (6, 6), mode="bilinear", antialias=True).round().byte())


def test_batches_are_pinned_if_pin_is_set(images, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    list(loader(images))
    assert not pinned
    (batch,) = loader(images, batch_size=50, pin=True)
    assert isinstance(batch, Batch)
    assert [id(member) for member in batch[:3]] == [id(tensor) for tensor in pinned]
    assert batch[3:] == (None, None)
    pinned.clear()
    (batch,) = loader(images, batch_size=50, pin=True, mix=Blend())
    assert {id(member) for member in batch} == {id(tensor) for tensor in pinned}


def test_training_drops_the_incomplete_batch_and_evaluation_keeps_it(images):
    train, evaluation = loader(images), loader(images, train=False)
    assert len(train) == 6
    assert len(epoch(train)[0]) == 48
    seen, index = epoch(evaluation)
    assert len(evaluation) == 7
    assert torch.equal(seen, images)  # all, in order, as they are
    assert index.tolist() == list(range(50))


def test_position_is_restored_in_the_middle_of_an_epoch(images):
    whole = loader(images)
    whole.sampler.set_epoch(3)
    batches = iter(whole)
    for _ in range(2):
        next(batches)
    position = whole.position()
    rest = [batch.index.tolist() for batch in batches]

    resumed = loader(images)
    resumed.restore(position)
    resumed.sampler.set_epoch(3)
    assert [batch.index.tolist() for batch in resumed] == rest
    assert len(list(resumed)) == len(resumed)  # only once

    next_epoch = loader(images)
    next_epoch.restore(position)
    assert len(epoch(next_epoch, 4)[1]) == 48


def observed_epoch(loader, number, losses):
    """Return the images of each batch of an epoch, in which the loader observes their losses."""
    loader.sampler.set_epoch(number)
    return [observe(loader, batch, losses) for batch in loader]


def observe(loader, batch, losses):
    loader.observe(batch.index, losses[batch.index])
    return batch.index.tolist()


def test_an_epoch_selects_unseen_images_and_the_hardest(images):
    losses = torch.rand(50)
    half = loader(images, batch_size=5, share=0.5)
    assert len(half) == 5
    first, second, third = (set(chain(*observed_epoch(half, number, losses))) for number in range(3))
    assert len(first) == 25
    assert second == set(range(50)) - first  # no other image is unseen
    assert third == set(losses.topk(25).indices.tolist())
    same, again = (list(chain(*observed_epoch(half, number, losses))) for number in (3, 4))
    assert set(same) == set(again) == third
    assert same != again  # in another order

    losses[losses.argmin()] = 1  # not observed: an image that is left out keeps its last loss
    assert set(chain(*observed_epoch(half, 5, losses))) == third
    assert len(loader(images, share=0.5, train=False)) == 7  # evaluation uses all images


def test_hardest_images_are_restored_in_the_middle_of_an_epoch(images):
    losses = torch.rand(3, 50)
    whole, parts = (loader(images, batch_size=5, share=0.5) for _ in range(2))
    expected = [observed_epoch(whole, number, losses[number]) for number in range(3)]

    seen = [observed_epoch(parts, 0, losses[0])]
    parts.sampler.set_epoch(1)
    first = [observe(parts, batch, losses[1]) for _, batch in zip(range(2), parts, strict=False)]
    resumed = loader(images, batch_size=5, share=0.5)
    resumed.restore(parts.position())
    seen += [first + observed_epoch(resumed, 1, losses[1]), observed_epoch(resumed, 2, losses[2])]
    assert seen == expected


class CountingImages(LazyImages):
    def __init__(self, images):
        self.images, self.shape = images, images.shape
        self.reads = 0  # by this process

    def __getitem__(self, place):
        self.reads += 1
        return self.images[place]


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_batches_equal_those_in_memory(images, workers):
    settings = {"train": True, "augment": Augment(3, "random"), "sizes": [12, 9], "seed": 5}
    streaming = StreamingLoader(CountingImages(images), torch.arange(50), 8, workers=workers, **settings)
    assert streaming.image_size == 12
    state = torch.get_rng_state()
    for number in (0, 1):
        for one, other in zip(epoch(streaming, number), epoch(loader(images, **settings), number), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)  # which dropout draws from
    assert (streaming.images.reads > 0) == (workers == 0)


class Blend:
    """Mixes pairs of images with random weights, and draws another number for each image."""

    def draw(self, count, size, seed, epoch):
        random = generator(seed, epoch, "blend")
        drawn = torch.rand(2, count, generator=random)
        return torch.randperm(count, generator=random), *drawn

    def __call__(self, images, partners, weight, more):
        lam = weight[:, None, None, None]
        return (lam * images + (1 - lam) * partners).to(torch.uint8), weight + more


def test_images_are_mixed_after_augmentation(images):
    plain, index = epoch(loader(images, batch_size=10), 2)
    shown = torch.empty_like(images).index_copy(0, index, plain)
    partners, weight, more = Blend().draw(50, 12, 5, 2)
    mixing = loader(images, batch_size=10, mix=Blend())
    mixing.sampler.set_epoch(2)
    assert len(mixing) == 5
    for mixed, labels, index, partners_labels, lam in mixing:
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, index)
        assert torch.equal(partners_labels, partners[index])
        assert torch.equal(lam, weight[index] + more[index])
        expected, _ = Blend()(shown[index], shown[partners[index]], weight[index], more[index])
        assert torch.equal(mixed, expected)
    assert all(batch[3:] == (None, None) for batch in loader(images, mix=Blend(), train=False))


@pytest.mark.parametrize(
    "settings",
    [{"train": False}, {"mix": Blend()}, {"share": 0.5}, {"sizes": [6]}],
    ids=lambda settings: next(iter(settings)),
)
def test_all_tensors_are_on_the_device(images, settings):
    """On "meta", which refuses operations with tensors on other devices."""
    augment = Augment(3, "random", cutout=5, fill=torch.tensor([7, 8, 9]))
    on_device = loader(images, device="meta", augment=augment, **settings)
    assert {losses.device.type for losses in (on_device._losses, on_device._observed)} == {"meta"}
    for batch in on_device:
        on_device.observe(batch.index, torch.empty(len(batch.index), device="meta"))
        assert {member.device.type for member in batch if member is not None} == {"meta"}
        assert batch.images.dtype == torch.uint8
    streaming = StreamingLoader(CountingImages(images), torch.arange(50), 8, workers=0, device="meta")
    assert {tensor.device.type for tensor in next(streaming._pixels([torch.arange(3)]))} == {"meta"}


def test_the_order_equals_that_of_recorded_runs(images):
    _, index = epoch(loader(images, batch_size=10), 3)
    assert torch.equal(index, torch.randperm(50, generator=generator(5, 3, "order")))


def test_fewer_images_than_a_batch_are_one(images):
    few = loader(images[:3])
    assert len(few) == 1
    assert len(epoch(few)[1]) == 3
    hardest = loader(images, share=0.001)
    assert (len(hardest), len(epoch(hardest)[1])) == (1, 1)


def test_defaults(images):
    labels = torch.arange(50)
    assert torch.equal(epoch(InMemoryLoader(images, labels, 8))[1], labels)  # not shuffled
    shuffled = InMemoryLoader(images, labels, 8, train=True)
    assert shuffled.batch_sampler is None  # Lightning expects the attribute
    assert shuffled.position() == {"epoch": 0, "served": 0}
    assert torch.equal(epoch(shuffled)[1], epoch(InMemoryLoader(images, labels, 8, train=True, seed=0))[1])
