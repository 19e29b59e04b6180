"""Training throughput of `+experiment=baseline` compared with plain loops and with the machine's limit.

    python benchmarks/throughput.py [data.batch_size=128]

All variants train the same network on the same images, cropped and flipped, with SGD with momentum and the same batch
size.

- cifarnet: Lightning's Trainer as in `python -m cifarnet.train`
- plain PyTorch: float32, NCHW, default SGD, a DataLoader with two workers and torchvision's per-image transforms
- keras: Keras on TensorFlow with its own augmentation layers, if both are installed

`matmul` is the rate of a 2048 x 2048 x 2048 product in cifarnet's precision, as a measure of the machine's speed. A
training step counts as three forward passes.
"""

import os
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import common
from cifarnet.build import make_data
from cifarnet.trainer import make_trainer
from steps import BATCHES, WARMUP, build_steps, compose_baseline, now, seconds_a_step


def cifarnet(overrides: Sequence[str]) -> float:
    """Return the images per second."""
    config = compose_baseline(*overrides)
    return config.data.batch_size / seconds_a_step(config)


class Pictures(Dataset):
    """A data set of PIL images with per-image transforms, as in most tutorials."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, crop_padding: int) -> None:
        to_picture = v2.ToPILImage()
        self.pictures = [to_picture(image) for image in images]
        self.labels = labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(images.shape[-1], padding=crop_padding, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def plain_pytorch(overrides: Sequence[str]) -> float:
    """Return the images per second."""
    config = compose_baseline(*overrides, "keep_freed_memory=false", "channels_last=false", "optimizer.fused=false")
    trainer, classifier, data, _ = build_steps(config)
    train, device = data.source.train, trainer.strategy.root_device
    network = classifier.network.to(device)
    optimizer = classifier.make_optimizer(network.parameters())
    pictures = Pictures(train.images, train.labels, config.data.crop_padding)
    loader = iter(DataLoader(pictures, config.data.batch_size, shuffle=True, num_workers=2, drop_last=True))
    start = 0.0
    for step in range(WARMUP + BATCHES):
        images, labels = next(loader)
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == WARMUP:
            start = now(device)
    return BATCHES * config.data.batch_size / (now(device) - start)


def keras(overrides: Sequence[str]) -> float:
    """Return the images per second."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import tensorflow as tf

    config = compose_baseline(*overrides, "keep_freed_memory=false")
    train = make_data(config).source.train
    layers = keras.layers
    network = keras.Sequential([layers.Input((32, 32, 3)), layers.Rescaling(1 / 255)])
    network.add(layers.RandomTranslation(1 / 16, 1 / 16, fill_mode="reflect"))
    network.add(layers.RandomFlip("horizontal"))
    for width in (32, 64):
        network.add(layers.Conv2D(width, 3, padding="same", activation="relu"))
        network.add(layers.Conv2D(width, 3, padding="same", activation="relu"))
        network.add(layers.MaxPooling2D(2))
    for layer in (layers.Flatten(), layers.Dense(512, activation="relu"), layers.Dense(10)):
        network.add(layer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), loss)
    pixels, size = train.images.permute(0, 2, 3, 1).numpy(), config.data.batch_size
    data = tf.data.Dataset.from_tensor_slices((pixels, train.labels.numpy())).shuffle(10_000).batch(size).prefetch(2)
    ends = []  # time at the end of each step
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    network.fit(data.take(WARMUP + BATCHES), callbacks=[clock], verbose=0)
    return BATCHES * size / (ends[-1] - ends[-1 - BATCHES])


def matmul(overrides: Sequence[str]) -> float:
    """Return the GFLOP/s."""
    config = compose_baseline(*overrides)
    trainer = make_trainer(config)
    device = trainer.strategy.root_device
    dtype = torch.bfloat16 if "bf16" in trainer.precision else torch.float32
    a, b = torch.randn(2, 2048, 2048, dtype=dtype, device=device)
    seconds = []
    for _ in range(60):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * 2048**3 / statistics.median(seconds[10:]) / 1e9


def operations_an_image(overrides: Sequence[str]) -> float:
    """Return the GFLOP of a training step per image: three times the forward pass."""
    config = compose_baseline(*overrides)
    network = build_steps(config).classifier.network
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32))
    return 3 * counter.get_total_flops() / 1e9


SIDES = {"plain PyTorch": plain_pytorch, "cifarnet": cifarnet}
if find_spec("keras") and find_spec("tensorflow"):
    SIDES["keras"] = keras


def main() -> None:
    arguments = common.parser(__doc__, turns=5).parse_args()
    values = common.take_turns(SIDES | {"matmul": matmul}, arguments)
    limit = values.pop("matmul", None)
    facts = {}
    if limit and "cifarnet" in values:
        rate = operations_an_image(arguments.overrides) * statistics.median(values["cifarnet"])
        share = rate / statistics.median(limit)
        facts = {"cifarnet, GFLOP/s": round(rate), "matmul, GFLOP/s": round(statistics.median(limit))}
        facts |= {"share of the matrix product's rate": f"{share:.0%}"}
    config = compose_baseline(*arguments.overrides)
    facts |= {"batch size": config.data.batch_size, "precision of cifarnet": make_trainer(config).precision}
    common.report("throughput", "images/s", values, base="plain PyTorch", **facts)


if __name__ == "__main__":
    main()
