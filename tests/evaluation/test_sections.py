import math

import pytest
import torch
from torch import nn

from cifarnet import cli
from cifarnet.data import ImageDataModule, InMemoryLoader, Source, Split
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.evaluation import public_sets, sections
from cifarnet.inference.predictor import Predictor

# red, green and blue of each test image; the third and fifth are mistaken for red
STRENGTHS = [[200, 0, 0], [0, 150, 0], [250, 0, 100], [0, 0, 150], [120, 90, 0], [0, 200, 150]]
LABELS = [0, 1, 2, 2, 1, 1]


class Colours(nn.Module):
    """Logits [B, 3]: the channels' means, from 0 to 5."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 51))

    def forward(self, images):
        return images.float().mean((2, 3)) * self.scale


class Coloured(ImageDataModule):
    def read(self):
        def split(strengths, labels):
            images = torch.tensor(strengths, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
            return Split(images, torch.tensor(labels))

        # the logit of red is 5, and red is right three times in four: eˣ / (eˣ + 2) = 3/4 at x = ln 6
        val = split([[255, 0, 0]] * 4, [0, 0, 0, 1])
        return Source(["red", "green", "blue"], split(STRENGTHS, LABELS), split(STRENGTHS, LABELS), val)


class Shuffled(Coloured):
    """The test images in another order."""

    def test_dataloader(self):
        test, order = self.source.test, torch.tensor([4, 2, 5, 0, 1, 3])
        return [Batch(test.images[index], test.labels[index], index) for index in order.split(4)]


def measure(cls=Coloured, public=None, noise_seed=None, network=None, settings=()):
    predictor, data = Predictor(network or Colours(), accelerator="cpu"), cls(batch_size=2, eval_batch_size=4)
    settings = [f"corruptions={noise_seed is not None}", f"seed={noise_seed or 0}", *settings]
    return sections.measure(predictor, data, public or public_sets.PublicSets(), cli.compose("evaluate", settings))


@pytest.fixture
def humans():
    return torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)


def test_test_images_by_hand():
    record, figures = measure()
    assert record["test"]["accuracy"] == record["test_accuracy_one_view"] == pytest.approx(4 / 6)
    assert record["confusion"] == [[1, 0, 0], [1, 2, 0], [1, 0, 1]]  # true, predicted
    assert [row["accuracy"] for row in record["classes"]] == pytest.approx([1, 2 / 3, 1 / 2])
    assert [mistake["index"] for mistake in record["mistakes"]] == [2, 4]  # in descending order of confidence
    first = record["mistakes"][0]
    assert (first["class"], first["predicted"]) == ("blue", "red")
    powers = [math.exp(strength / 51) for strength in STRENGTHS[2]]
    assert first["confidence"] == pytest.approx(powers[0] / sum(powers))
    assert sorted(figures) == ["confused_1", "confused_2", "confusion", "mistakes", "reliability", "selective"]
    assert record["corruptions"] is record["cifar10_c"] is record["cifar10_1"] is record["cifar10h"] is None


def test_precision_f1_and_macro_f1_by_hand():
    record, _ = measure()
    assert [row["precision"] for row in record["classes"]] == pytest.approx([1 / 3, 1, 1])
    assert [row["f1"] for row in record["classes"]] == pytest.approx([1 / 2, 4 / 5, 2 / 3])
    assert record["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)


def test_confused_pairs_show_the_images_of_both_directions():
    class Mistaken(Coloured):
        """Five images of blue are mistaken for red and three of red for blue, and one of green for red."""

        def read(self):
            source = super().read()
            reds, blues = [[100 + 10 * i, 0, 0] for i in range(6)], [[0, 0, 100 + 10 * i] for i in range(3)]
            images = torch.tensor([*reds, *blues], dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)
            source.test = Split(images.contiguous(), torch.tensor([2] * 5 + [1] + [0] * 3))
            return source

    _, figures = measure(Mistaken)
    first, second = (figures[f"confused_{rank}"].axes[0] for rank in (1, 2))
    assert first.texts[-1].get_text() == "red → blue: 3    blue → red: 5"
    assert second.texts[-1].get_text() == "red → green: 0    green → red: 1"
    strengths = [image.get_array().max() for image in first.images]
    assert strengths == [140, 130, 120, 120, 110, 110]  # the six most confident; index 5 is green
    assert [image.get_array().max() for image in second.images] == [150]
    assert "confused_3" not in figures


def test_predictions_of_each_image():
    record, _ = measure()
    assert [row["image"] for row in record["predictions"]] == list(range(6))
    assert [row["correct"] for row in record["predictions"]] == [True, True, False, True, False, True]


def test_temperature_is_fitted_on_validation_images():
    record, _ = measure()
    assert record["val"]["accuracy"] == 0.75
    assert record["temperature"] == pytest.approx(5 / math.log(6), rel=1e-4)
    assert record["test_with_temperature"]["cross_entropy"] != record["test"]["cross_entropy"]


def test_order_of_the_images_does_not_matter(humans):
    public = public_sets.PublicSets(cifar10h=humans)
    (record, _), (shuffled, _) = (measure(cls, public) for cls in (Coloured, Shuffled))
    assert record["mistakes"] == shuffled["mistakes"]
    assert record["selective"] == shuffled["selective"]
    rows = [sorted(part["predictions"], key=lambda row: row["image"]) for part in (record, shuffled)]
    assert rows[0] == rows[1]
    assert record["confusion"] == shuffled["confusion"]
    assert record["cifar10h"] == pytest.approx(shuffled["cifar10h"], rel=1e-9)
    turned = measure(public=public_sets.PublicSets(cifar10h=humans.flip(0)))[0]
    assert record["cifar10h"]["cross_entropy"] != pytest.approx(turned["cifar10h"]["cross_entropy"], rel=1e-3)


def test_all_sections(capsys):
    test = Coloured(batch_size=2).source.test
    right, wrong = (InMemoryLoader(test.images, labels, 4) for labels in (test.labels, (test.labels + 1) % 3))
    public = public_sets.PublicSets({"fog": [right] * 5, "spatter": [wrong] * 5}, {"v6": right})
    record, figures = measure(public=public, noise_seed=1)
    assert record["cifar10_c"]["accuracy"]["fog"] == pytest.approx([4 / 6] * 5)
    assert record["cifar10_c"]["averaged"] == ["fog"]
    assert record["cifar10_c"]["mean"] == pytest.approx(4 / 6)
    assert record["cifar10_1"]["v6"]["accuracy"] == record["test"]["accuracy"]
    rows = record["corruptions"]["accuracy"]
    assert record["corruptions"]["mean"] == pytest.approx(sum(map(sum, rows.values())) / (5 * len(rows)))
    assert rows.keys() == record["corruptions"]["levels"].keys()
    assert rows["pixelate"] == pytest.approx([4 / 6] * 5)  # each image has a single colour
    assert {"corruptions", "corruption_examples", "cifar10_c"} < set(figures)
    assert "pixelate" in capsys.readouterr().out


def test_network_without_mistakes():
    class Perfect(Coloured):
        def read(self):
            source = super().read()
            source.test = source.test[torch.tensor([0, 1, 3])]
            return source

    record, figures = measure(Perfect)
    assert record["mistakes"] == []
    assert not {"mistakes", "confused_1"} & set(figures)


def test_diverged_network():
    network = Colours()
    network.scale.data.fill_(math.nan)
    with pytest.raises(UserError, match="training diverged"):
        measure(network=network)
