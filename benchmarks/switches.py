"""What each switch brings: the baseline's training throughput with one thing changed at a time.

python benchmarks/switches.py
"""

from collections.abc import Sequence
from functools import partial

import common
from cifarnet.callbacks import Compile
from steps import Timer, compose_baseline, make_data, make_module, make_trainer

SWITCHES = {
    "as configured": [],
    "keep_freed_memory=false": ["keep_freed_memory=false"],
    "channels_last=false": ["channels_last=false"],
    "trainer.precision=32-true": ["trainer.precision=32-true"],
    "optimizer.fused=false": ["optimizer.fused=false"],
    "threads=1": ["threads=1"],
    "compile=true": ["compile=true"],
    "all off": ["keep_freed_memory=false", "channels_last=false", "trainer.precision=32-true"],
}


def images_a_second(overrides: Sequence[str], switch: Sequence[str]) -> float:
    config = compose_baseline(*overrides, *switch)
    timer = Timer()
    callbacks = [Compile(), timer] if config.compile else [timer]
    trainer = make_trainer(config, callbacks)
    trainer.fit(make_module(config), datamodule=make_data(config))
    return config.data.batch_size / timer.seconds_a_step


def main() -> None:
    sides = {name: partial(images_a_second, switch=switch) for name, switch in SWITCHES.items()}
    values = common.take_turns(sides, common.parser(__doc__, turns=5).parse_args())
    common.report("switches", "images/s", values, base="as configured")


if __name__ == "__main__":
    main()
