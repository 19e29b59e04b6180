"""Serve a page that predicts the class of a picture and shows which parts of it support the prediction.

examples:
  python -m cifarnet.demo lightning_logs/baseline/<date_time>
  python -m cifarnet.demo <run> <another run>          side by side
  python -m cifarnet.demo <run> data.root=pictures     other test pictures to choose from
"""

import contextlib
import html
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import NoImages, UserError, printable
from cifarnet.inference.settings import prepare, without_data

if TYPE_CHECKING:
    from torch import Tensor

    from cifarnet.inference.trained import Trained

NUM_SEARCHED = 1000  # the number of test pictures that are searched for mistakes
SIDE = 256  # the size to which pictures are enlarged, in pixels


@contextlib.contextmanager
def serving(runs: Sequence[str], overrides: Sequence[str] = ()) -> Iterator[str]:
    """Serve the page for the duration of the context, and yield its address.

    Args:
        runs: paths of runs' folders or checkpoint files.
        overrides: overrides of `configs/demo.yaml`, such as "port=8000".

    Raises:
        UserError: a checkpoint or a setting cannot be used, or the address cannot be served.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("cifarnet.demo needs gradio: pip install 'cifarnet[demo]'") from error

    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load

    config = prepare("demo", without_data(overrides))
    models = {run: load(run, locate(config.classes)) for run in runs}
    settings = {key: config[key] for key in ("temperature", "tta", "precision", "accelerator")}
    for model in models.values():
        model.predict(np.zeros((32, 32, 3), np.uint8), **settings)  # checks the settings
    first, examples = models[runs[0]], []
    with tempfile.TemporaryDirectory(prefix="cifarnet-demo-") as folder:
        try:
            if config.pictures:
                test = test_images.read("demo", overrides, first.checkpoint, config.classes, NUM_SEARCHED)
                examples = choose(first, *test, config.pictures, Path(folder), settings)
        except NoImages as error:
            print(printable(f"No test pictures to choose from: {error}"))
        page = build_page(models, examples, settings)
        try:
            _, address, _ = page.launch(
                server_name=config.host,
                server_port=config.port,
                max_file_size=int(config.upload_limit * 2**20),
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no web fonts
                footer_links=[],
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            reason = "the port is in use, or the host is not an address of this machine. Use port=null for a free port."
            address = f"host={config.host} port={config.port}"
            raise UserError(f"The page cannot be served at {address}: {reason}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def build_page(
    models: "Mapping[str, Trained]", examples: Sequence[tuple[str, str]], settings: Mapping[str, Any]
) -> Any:
    """Return the page, which has a picture on the left and a column for each network.

    Args:
        models: networks by the path of their run.
        examples: paths of pictures to choose from, and their captions.
        settings: the settings of `Trained.answers`.
    """
    import gradio as gr

    def analyze_upload(path: str | None) -> list[Any]:
        if path is None:
            return [None, None, None] * len(models)
        try:
            return [output for model in models.values() for output in analyze(model, path, settings)]
        except UserError as error:
            message = str(error).replace(path, "This picture")
            raise gr.Error(html.escape(printable(message)), print_exception=False) from error

    def choose_example(event: gr.SelectData) -> str:
        return examples[event.index][0]

    with gr.Blocks(analytics_enabled=False, title="cifarnet") as page, gr.Row():
        with gr.Column(min_width=280):
            upload: Any = {"type": "filepath", "image_mode": None, "sources": ["upload", "webcam", "clipboard"]}
            picture = gr.Image(label="A picture", height=240, **upload)
            picture.preprocess = lambda payload: payload and payload.path  # cifarnet decodes the file, not gradio
            if examples:
                layout: Any = {"columns": 3, "height": 420, "object_fit": "contain", "allow_preview": False}
                gr.Gallery(examples, label="Test pictures", **layout).select(choose_example, None, picture)
        outputs = []
        for run, model in models.items():
            with gr.Column(min_width=280):
                outputs.append(gr.Label(label=f"{run}, epoch {model.checkpoint.epoch}", num_top_classes=10))
                with gr.Row():
                    style: Any = {"interactive": False, "format": "png", "min_width": 120, "buttons": []}
                    outputs += [gr.Image(label=label, **style) for label in ("The network's input", "Grad-CAM")]
        picture.change(analyze_upload, picture, outputs, api_name="answer", show_progress="hidden")
    return page


def analyze(model: "Trained", path: str, settings: Mapping[str, Any]) -> list[Any]:
    """Return the probability of each class, the network's input and its Grad-CAM map.

    Raises:
        UserError: the picture cannot be read.
    """
    from cifarnet.inference.figures import overlay

    if not os.path.isfile(path):  # a request can contain the path of a folder of uploads
        raise UserError(f"{path} is not a file.")
    (answer,) = model.answers([path], **settings)
    if answer.error:
        raise UserError(answer.error)
    images = [answer.pixels, overlay(answer.pixels, model.heat(answer))]
    factor = max(1, SIDE // len(answer.pixels))  # each pixel becomes a square
    return [dict(answer.ranked), *(image.repeat(factor, axis=0).repeat(factor, axis=1) for image in images)]


def choose(
    model: "Trained", images: "Tensor", labels: Sequence[int], count: int, folder: Path, settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Choose test pictures: at least two thirds at regular intervals, then the most confident mistakes.

    Args:
        images: uint8 [N, 3, size, size].
        count: the number of pictures to choose.
        folder: the folder to write the chosen pictures to.
        settings: the settings of `Trained.answers`.

    Returns:
        The paths of the pictures, and their captions.
    """
    from PIL import Image

    predictions = model.predict(images, **settings)
    names = [model.class_names[label] for label in labels]
    wrong = [index for index, name in enumerate(names) if predictions[index].label != name]
    mistakes = sorted(wrong, key=lambda index: -predictions[index].probability)[: count // 3]
    others = [index for index in range(len(names)) if index not in mistakes]
    count -= len(mistakes)
    examples = []
    for index in others[:: max(1, len(others) // count)][:count] + mistakes:
        path, caption, prediction = folder / f"{index}.png", names[index], predictions[index]
        if prediction.label != caption:
            caption += f", predicted {prediction.label} ({prediction.probability:.0%})"
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(path)
        examples.append((str(path), printable(caption)))
    return examples


def _command() -> None:
    paths, overrides, _ = cli.parse("demo", __doc__)
    with serving(paths, overrides) as address:
        print(f"Open {address} in a browser. Press Ctrl-C to stop.", flush=True)
        threading.Event().wait()


def main() -> None:
    """Run `python -m cifarnet.demo`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
