"""Effect of each setting: training throughput of the baseline with one change at a time.

python benchmarks/switches.py
"""

import tempfile
from collections.abc import Sequence
from functools import partial

import common
from steps import compose_baseline, seconds_a_step

SWITCHES = {
    "as configured": [],
    "keep_freed_memory=false": ["keep_freed_memory=false"],
    "channels_last=false": ["channels_last=false"],
    "trainer.precision=32-true": ["trainer.precision=32-true"],
    "optimizer.fused=false": ["optimizer.fused=false"],
    "threads=1": ["threads=1"],
    "compile=true": ["compile=true"],
    "callbacks=dynamics": [  # without the default callbacks, as in the other rows
        "+callbacks.dynamics._target_=cifarnet.callbacks.dynamics.Dynamics",
        f"output_dir={tempfile.gettempdir()}/switches",
    ],
    "all off": ["keep_freed_memory=false", "channels_last=false", "trainer.precision=32-true"],
}


def images_a_second(overrides: Sequence[str], switch: Sequence[str]) -> float:
    config = compose_baseline(*overrides, *switch)
    return config.data.batch_size / seconds_a_step(config)


def main() -> None:
    sides = {name: partial(images_a_second, switch=switch) for name, switch in SWITCHES.items()}
    values = common.take_turns(sides, common.parser(__doc__, turns=5).parse_args())
    common.report("switches", "images/s", values, base="as configured")


if __name__ == "__main__":
    main()
