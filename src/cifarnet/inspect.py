"""Show what a run will do, without training it: layers, steps, learning rates, augmented images, seconds and memory.

python -m cifarnet.inspect +experiment=quickstart lr_find=true
"""

import copy
import sys
from dataclasses import dataclass
from typing import Annotated

from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.config import output_folder, validate
from cifarnet.errors import UserError
from cifarnet.schema import Range, check_settings
from cifarnet.sweeps.task import run_hydra
from cifarnet.system import distributed, hardware
from cifarnet.system.log_output import quiet_libraries, report


@dataclass
class Settings:
    """The settings in `configs/inspect.yaml` that `configs/train.yaml` does not have."""

    depth: Annotated[int, Range(1)] | None
    lr_find: bool
    lr_min: Annotated[float, Range(above=0)]
    lr_max: Annotated[float, Range(above=0)]
    lr_steps: Annotated[int, Range(10, 100_000)]


def inspect(config: DictConfig) -> None:
    """Print the layers, steps and costs of a run, and write pictures into `output_dir`.

    Args:
        config: a config composed from `configs/inspect.yaml`.

    Raises:
        UserError: a setting or the data cannot be used.
    """
    import numpy as np  # these imports take seconds, and `--help` does not need them

    from cifarnet.checkpoint import refuse_results
    from cifarnet.data.shared_images import SharedImages
    from cifarnet.finetuning import expand
    from cifarnet.inspection import layers, steps
    from cifarnet.inspection.images import draw_images
    from cifarnet.records.collect import heading
    from cifarnet.records.figures import save
    from cifarnet.records.tables import row_table

    quiet_libraries()
    check_settings(config, Settings)
    if config.lr_min >= config.lr_max:
        raise UserError(f"lr_min={config.lr_min} must be below lr_max={config.lr_max}. Change one of them.")
    run = expand(OmegaConf.masked_copy(config, [str(key) for key in config if key not in Settings.__annotations__]))
    validate(run)
    if config.lr_find and not run.optimizer.get("lr"):
        raise UserError(f"lr_find=true varies optimizer.lr, which is {run.optimizer.get('lr')}. Set optimizer.lr=0.1.")
    folder, images, measured = output_folder(run), SharedImages(), steps.Steps()
    refuse_results(folder)
    if (count := max(distributed.num_processes(run.trainer), distributed.placement().world_size)) > 1:
        raise UserError(f"inspect needs one process, but has {count}. Set trainer.devices=1, without torchrun or srun.")
    with hardware.prepared_process(run):
        trainer, classifier, data, _ = built = steps.build_steps(run, measured, images)
        report(heading(run, built))
        device = trainer.strategy.root_device
        batch = data.sample(data.batch_size).to(device, memory_format=classifier.memory_format)
        report(f"\nMultiply-adds of one image, and activations of {len(batch)} images in training:")
        with trainer.precision_plugin.forward_context():
            report(layers.table(copy.deepcopy(classifier.network).to(device), batch, config.depth))
        drawn = draw_images(built)  # before `fit`, which moves the images to a GPU
        sizes, data.train_sizes = data.train_sizes, None
        trainer.fit(classifier, datamodule=data)
        report(row_table(steps.costs(built, measured, sizes)))
        save(steps.draw_schedule(built), folder / "learning_rate.png")
        save(drawn, folder / "augmented_batches.png")
        if config.lr_find:
            rates = np.geomspace(config.lr_min, config.lr_max, config.lr_steps).tolist()
            suggestion, figure = steps.suggest(*steps.range_test(run, rates, images), run.optimizer.lr)
            save(figure, folder / "lr_find.png")
            report(f"Suggestion of the range test: {suggestion}")


def command() -> None:
    """Compose a config from the arguments of this process, and inspect it."""
    arguments = sys.argv[1:]
    for argument in arguments:
        if argument in ("-m", "--multirun") or cli.key_of(argument) in ("hydra.mode", "ckpt_path", "sweep.resume"):
            raise UserError(f"{argument}: inspect describes one new run. Remove this argument.")
    run_hydra(inspect, arguments, "inspect")


def main() -> None:
    """Run `python -m cifarnet.inspect`."""
    cli.run(command)


if __name__ == "__main__":
    main()
