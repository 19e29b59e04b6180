"""A page in the browser: drop a picture, and see what a trained network takes it for, and where it looked."""

import contextlib
import html
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import UserError, printable
from cifarnet.schema import Range, Seed

if TYPE_CHECKING:
    import gradio
    import numpy as np

    from cifarnet.inference.trained import Trained

EXAMPLES = """\
  python -m cifarnet.demo lightning_logs/baseline/<date_time>
  python -m cifarnet.demo <run> <another run>          side by side
  python -m cifarnet.demo <run> data.root=pictures     other test pictures to choose from
"""
TYPES = {"seed": int, "host": str, "port": int | None, "upload_limit": float, "pictures": int, "tta": str | None}
TYPES |= {"temperature": float | str | None, "precision": str | int | None, "accelerator": str, "classes": list[str]}
RANGES = {"seed": Seed, "port": Annotated[int, Range(1, 65535)], "pictures": Annotated[int, Range(0, 1000)]}
RANGES |= {"upload_limit": Annotated[float, Range(above=0, most=10_000)]}
LOOKED_THROUGH = 1000  # test pictures, for mistakes
SIDE = 256  # pixels of what is shown of a picture


def build(runs: Sequence[str], overrides: Sequence[str], folder: Path) -> "tuple[gradio.Blocks, DictConfig]":
    """The page, not yet served, and its settings.

    Args:
        runs: a folder or a checkpoint file each.
        overrides: of `configs/demo.yaml`, such as "port=8000".
        folder: where the pictures to choose from are written.

    Raises:
        UserError: a checkpoint or a setting cannot be used.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("cifarnet.demo needs gradio: pip install 'cifarnet[demo]'") from error

    import numpy as np

    from cifarnet import checkpoint
    from cifarnet.inference import test_images, trained
    from cifarnet.system.log_output import quiet_libraries

    quiet_libraries()
    config, of_data = test_images.own("demo", overrides, TYPES, RANGES)
    paths = [checkpoint.find(run) for run in runs]
    contents = [checkpoint.read(path) for path in paths]
    classes = locate(config.classes)
    classifiers = [trained.of(content, path, classes) for content, path in zip(contents, paths, strict=True)]
    for classifier in classifiers:
        classifier.temperature(config.temperature, config.tta)
        blank = np.zeros((classifier.image_size, classifier.image_size, 3), np.uint8)
        list(classifier.answers([blank], **asked(config)))  # what cannot be used is told now
    examples, missing = [], ""
    if config.pictures:
        try:
            data = test_images.configure("demo", contents[0], paths[0], overrides, TYPES, RANGES)
            examples = choose(classifiers[0], contents[0], data, folder)
        except UserError as error:  # whoever has but a checkpoint can do without
            if of_data:
                raise
            missing = str(error)

    def answer(path: str | None) -> list[Any]:
        try:
            return [part for classifier in classifiers for part in shown(classifier, path, config)]
        except UserError as error:
            raise gr.Error(html.escape(printable(str(error))), print_exception=False) from error

    def take(event: gr.SelectData) -> str:
        return examples[event.index][0]

    with gr.Blocks(analytics_enabled=False, title="cifarnet") as page:
        with gr.Row():
            with gr.Column(min_width=280):
                picture = gr.Image(
                    label="A picture",
                    type="filepath",
                    height=240,
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                )
                picture.preprocess = lambda upload: upload and upload.path  # the one way to pixels is ours
                if examples:
                    gallery = gr.Gallery(
                        examples,
                        label="Test pictures",
                        columns=3,
                        object_fit="contain",
                        allow_preview=False,
                        height=420,
                    )
                    gallery.select(take, None, picture)
                elif missing:
                    gr.Markdown("No test pictures to choose from: the command that began this page says why.")
            outputs, above = [], os.path.dirname(os.path.commonpath([os.path.abspath(run) for run in runs]))
            for run, classifier in zip(runs, classifiers, strict=True):
                with gr.Column(min_width=280):
                    outputs.append(
                        gr.Label(label=f"{os.path.relpath(run, above)}, epoch {classifier.epoch}", num_top_classes=10)
                    )
                    with gr.Row():
                        for label in ("What it sees", "Where it looked"):
                            outputs.append(
                                gr.Image(label=label, interactive=False, format="png", min_width=120, buttons=[])
                            )
        picture.change(answer, picture, outputs, api_name="answer", show_progress="hidden")
    if missing:
        print(printable(f"No test pictures to choose from: {missing}"))
    return page, config


def shown(classifier: "Trained", path: str | None, config: DictConfig) -> list[Any]:
    """Probabilities by class, the picture as the network sees it, and where it looked."""
    from cifarnet.inference.figures import heated

    if path is None:
        return [None, None, None]
    if not os.path.isfile(path):  # whoever reaches the page may name a folder of uploads
        raise UserError("This picture is no file.")
    (answer,) = classifier.answers([path], **asked(config))
    if answer.logits is None:
        raise UserError(answer.error.replace(path, "This picture"))
    ranked = classifier.ranked(answer.logits, classifier.temperature(config.temperature, config.tta))
    heat = classifier.heat(answer.pixels, answer.logits)
    return [dict(ranked), enlarged(answer.pixels), enlarged(heated(answer.pixels, heat))]


def asked(config: DictConfig) -> dict[str, Any]:
    """The settings of `Trained.answers`."""
    return {key: config[key] for key in ("tta", "precision", "accelerator")}


def enlarged(pixels: "np.ndarray") -> "np.ndarray":
    """Small pictures with each pixel as a square."""
    factor = max(1, SIDE // len(pixels))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def choose(
    classifier: "Trained", content: Mapping[str, Any], config: DictConfig, folder: Path
) -> list[tuple[str, str]]:
    """Of `LOOKED_THROUGH` test pictures some, as PNG files in a folder, and their captions: at first what is right and
    wrong, as it comes, then the most confident mistakes. `content` is the checkpoint's."""
    from PIL import Image

    from cifarnet.inference import test_images

    images, labels = test_images.some(config, content, LOOKED_THROUGH)
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    temperature = classifier.temperature(config.temperature, config.tta)
    top = [classifier.ranked(answer.logits, temperature)[0] for answer in classifier.answers(pixels, **asked(config))]
    names = [classifier.class_names[label] for label in labels]
    wrong = [place for place, (name, (label, _)) in enumerate(zip(names, top, strict=True)) if name != label]
    surest = sorted(wrong, key=lambda place: -top[place][1])[: config.pictures // 3]
    others = [place for place in range(len(pixels)) if place not in surest]
    others = others[:: max(1, len(others) // (config.pictures - len(surest)))][: config.pictures - len(surest)]
    examples = []
    for place in others + surest:
        (label, share), name = top[place], names[place]
        Image.fromarray(pixels[place]).save(folder / f"{place}.png")
        taken = "" if label == name else f", taken for {label} ({share:.0%})"
        examples.append((str(folder / f"{place}.png"), printable(f"{name}{taken}")))
    return examples


@contextlib.contextmanager
def serving(runs: Sequence[str], overrides: Sequence[str] = ()) -> Iterator[str]:
    """The page, served as long as this lasts. Yields its address."""
    with tempfile.TemporaryDirectory(prefix="cifarnet-demo-") as folder:
        page, config = build(runs, overrides, Path(folder))
        import gradio as gr

        try:
            _, address, _ = page.launch(
                server_name=config.host,
                server_port=config.port,
                max_file_size=int(config.upload_limit * 2**20),
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from afar
                footer_links=[],
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            asked = f"host={config.host} port={config.port}"
            told = "the port is taken, or the host is none of this machine's addresses. port=null takes a free port."
            raise UserError(f"{asked} cannot be served: {told}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _command() -> None:
    paths, overrides, _ = cli.parse("demo", __doc__, EXAMPLES)
    with serving(paths, overrides) as address:
        print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
        threading.Event().wait()


def main() -> None:
    """The command `python -m cifarnet.demo`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
