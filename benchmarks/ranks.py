"""Two processes with one thread each compared with one process with two threads, on one CPU.

    python benchmarks/ranks.py [data=folder data.root=…]

This also prints the time to exchange the gradients: an all-reduce with as many numbers as the network has parameters.
On a machine with several GPUs: `python benchmarks/ranks.py trainer.accelerator=gpu` compares one GPU with two.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch

import common
from cifarnet.build import make_data, make_network
from cifarnet.cli import compose

SIDES = {
    "one process": ["trainer.devices=1"],
    "two processes": ["trainer=ddp", "trainer.devices=2"],
}


def images_a_second(overrides: Sequence[str], side: Sequence[str]) -> float:
    device = [] if "trainer.accelerator=gpu" in overrides else ["trainer.accelerator=cpu"]
    return common.train("baseline", *side, *device, "trainer.max_epochs=1", *overrides)["images_per_second"]


def exchange(numbers: int, times: int = 20) -> float:
    """Return the median seconds of an all-reduce of float32 numbers between two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", sys.argv[0]]
    told = subprocess.run(
        [*command, "--exchange", str(numbers), str(times)], capture_output=True, text=True, check=True
    )
    return float(told.stdout.split()[-1])


def _exchange(numbers: int, times: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    values, seconds = torch.randn(numbers), []
    for _ in range(times):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    if torch.distributed.get_rank() == 0:
        print(statistics.median(seconds))
    torch.distributed.destroy_process_group()


def main() -> None:
    if sys.argv[1:2] == ["--exchange"]:
        return _exchange(int(sys.argv[2]), int(sys.argv[3]))
    sides = {name: partial(images_a_second, side=side) for name, side in SIDES.items()}
    arguments = common.parser(__doc__, turns=3).parse_args()
    values = common.take_turns(sides, arguments)
    config = compose("train", ["+experiment=baseline", "output_dir=/nowhere", *arguments.overrides])
    network, _ = make_network(config, make_data(config))
    numbers = sum(parameter.numel() for parameter in network.parameters())
    seconds = exchange(numbers)
    common.report("ranks", "images/s", values, parameters=numbers, exchange_seconds=round(seconds, 5))


if __name__ == "__main__":
    main()
