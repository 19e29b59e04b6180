"""Serve a page that predicts the class of a picture and shows which parts of it support the prediction.

examples:
  python -m cifarnet.demo speedrun                     a trained network of this package
  python -m cifarnet.demo lightning_logs/baseline/<date_time>
  python -m cifarnet.demo <run> <another run>          side by side
  python -m cifarnet.demo <run> data.root=pictures     other test pictures to choose from
"""

import contextlib
import html
import ipaddress
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import NoImages, UserError, printable
from cifarnet.inference.settings import prepare, without_data
from cifarnet.system.signals import interrupting

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from torch import Tensor

    from cifarnet.inference.trained import Trained

NUM_SEARCHED = 1000  # the number of test pictures that are searched for mistakes
SIDE = 256  # the size to which pictures are enlarged, in pixels
MAX_PIXELS = 2**25  # of an uploaded picture; decoding a larger one needs more than a gigabyte
# captions of test pictures are not cut off, and a phone shows two pictures in a row
STYLE = """
.caption-label { white-space: normal !important; max-width: 100%; padding: 2px 6px !important; font-size: 12px; }
@media (max-width: 640px) { .grid-container { grid-template-columns: repeat(2, 1fr) !important; } }
"""
# what the page sends; gradio's other addresses accept files to process, or links to fetch
POSTS = re.compile(r"/gradio_api/(upload|queue/join|call/answer|cancel|reset)/?")


@contextlib.contextmanager
def serving(runs: Sequence[str], overrides: Sequence[str] = ()) -> Iterator[str]:
    """Serve the page for the duration of the context, and yield its address.

    Args:
        runs: runs' folders, checkpoint files or names of trained networks.
        overrides: overrides of `configs/demo.yaml`, such as "port=8000".

    Raises:
        UserError: a checkpoint or a setting cannot be used, or the address cannot be served.
    """
    config = prepare("demo", without_data(overrides))
    host = config.host.strip("[]")
    _check_address(host, config.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    import gradio as gr
    from starlette.middleware import Middleware

    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load

    models = {run: load(run, locate(config.classes)) for run in runs}
    settings = {key: config[key] for key in ("temperature", "tta", "precision", "accelerator")}
    for model in models.values():
        model.predict(np.zeros((32, 32, 3), np.uint8), **settings)  # checks the settings
    first, examples = models[runs[0]], []
    with tempfile.TemporaryDirectory(prefix="cifarnet-demo-", ignore_cleanup_errors=True) as private:
        folder = Path(private).resolve()
        os.environ |= {"GRADIO_TEMP_DIR": private, "GRADIO_EXAMPLES_CACHE": private}  # for uploads
        try:
            if config.pictures:
                data = test_images.load("demo", overrides, first.checkpoint, config.classes)
                test = test_images.sample(data.source.test, NUM_SEARCHED)
                examples = choose(first, *test, config.pictures, folder, settings)
        except NoImages as error:
            print(printable(f"No test pictures to choose from: {error}"))
        page = build_page(models, examples, settings, folder)
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=config.port,
            max_file_size=int(config.upload_limit * 2**20),
            app_kwargs={"middleware": [Middleware(only_this_page, host=host)]},  # pyright: ignore[reportArgumentType]
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no web fonts
            css=STYLE,
            footer_links=[],
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2  # Pillow accepts twice this number
        try:
            yield address
        finally:
            Image.MAX_IMAGE_PIXELS = limit
            page.close(verbose=False)


def _check_address(host: str, port: int | None) -> None:
    """Check that the page can be served at an address; Gradio would retry for minutes.

    Raises:
        UserError: the host is not an address of this machine, or the port is in use.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        chosen = f"host={host}" + (f" port={port}" if port else "")
        remedy = "Use host=127.0.0.1, or an address of this machine, and port=null for a free port."
        raise UserError(f"The page cannot be served at {chosen}: {error.strerror}. {remedy}") from error


def only_this_page(app: "ASGIApp", host: str) -> "ASGIApp":
    """Return an ASGI app that passes on only the requests that the demo's page sends.

    Otherwise, a foreign page in a visitor's browser could send requests to the demo, with its own name (DNS rebinding)
    or from its own origin, and gradio would fetch URLs in paths.

    Args:
        host: the address that is served. If it stands for all addresses, the host of a request can be any IP address.
    """
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    names = {"localhost", "127.0.0.1", "::1", host.lower(), socket.gethostname().lower()}

    def is_from_page(scope: "Scope") -> bool:
        headers = Headers(scope=scope)
        served, origin = headers.get("host", "").lower(), headers.get("origin")
        try:
            name = urlsplit(f"//{served}").hostname or ""
            is_known = name in names or (host in ("0.0.0.0", "::") and bool(ipaddress.ip_address(name)))
            is_same = origin is None or urlsplit(origin).netloc.lower() == served
        except ValueError:  # not an address
            return False
        is_needed = scope["method"] in ("GET", "HEAD") or POSTS.fullmatch(scope["path"])
        return is_known and is_same and bool(is_needed) and "://" not in scope["path"]

    async def answer(scope: "Scope", receive: "Receive", send: "Send") -> None:
        is_accepted = scope["type"] != "http" or is_from_page(scope)
        remedy = "Open the address that the demo printed, or set host=."
        refusal = PlainTextResponse(f"This request does not come from the page of the demo. {remedy}", 403)
        await (app if is_accepted else refusal)(scope, receive, send)

    return answer


def build_page(
    models: "Mapping[str, Trained]",
    examples: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    folder: Path,
) -> Any:
    """Return the page, which has a picture on the left and a column for each network, and test pictures below.

    Args:
        models: networks by the path of their run.
        examples: paths of pictures to choose from, and their captions.
        settings: the settings of `Trained.answers`.
        folder: the folder of uploads and examples; other files are refused.
    """
    import gradio as gr

    def analyze_upload(path: str | None) -> list[Any]:
        if path is None:
            return [None, None, None] * len(models)
        try:
            if not os.path.isfile(path) or folder not in Path(path).resolve().parents:
                raise UserError(f"{path} is not an uploaded file.")  # a request can contain any path
            return [output for model in models.values() for output in analyze(model, path, settings)]
        except UserError as error:
            message = str(error).replace(path, "This picture")
            raise gr.Error(html.escape(printable(message)), print_exception=False) from error

    def choose_example(event: gr.SelectData) -> str:
        return examples[event.index][0]

    async def keep(path: str) -> str:
        return path

    first = next(iter(models.values()))
    with gr.Blocks(analytics_enabled=False, title="cifarnet: classify a picture") as page:
        gr.Markdown(f"# What does the picture show?\nThe network chooses one of {len(first.class_names)} classes.")
        with gr.Row():
            with gr.Column(min_width=280):
                upload: Any = {"type": "filepath", "image_mode": None, "sources": ["upload", "webcam", "clipboard"]}
                picture: Any = gr.Image(label="A picture", height=300, **upload)
                picture.preprocess = lambda payload: payload and payload.path  # cifarnet decodes the file, not gradio
                picture.async_move_resource_to_block_cache = keep  # gradio would fetch a URL
            outputs = []
            for title in titles(models):
                with gr.Column(min_width=280):
                    outputs.append(gr.Label(label=title, num_top_classes=10))
                    with gr.Row():
                        style: Any = {"interactive": False, "format": "png", "min_width": 120, "buttons": []}
                        outputs += [gr.Image(label=label, **style) for label in ("The network's input", "Grad-CAM")]
        if examples:
            layout: Any = {"columns": 6, "height": "auto", "allow_preview": False, "buttons": []}
            gr.Gallery(examples, label="Test pictures", **layout).select(choose_example, None, picture)
        picture.change(analyze_upload, picture, outputs, api_name="answer", show_progress="hidden")
    return page


def titles(models: "Mapping[str, Trained]") -> list[str]:
    """Return the name of each run or network, and the path of its run if the names are not unique."""
    pairs = [(model.run_record(), model.checkpoint.network_name) for model in models.values()]
    names = [record.name if record else network for record, network in pairs]
    if len(set(names)) < len(names):
        names = [f"{name} ({run})" for name, run in zip(names, models, strict=True)]
    return [f"{name}, epoch {model.checkpoint.epoch}" for name, model in zip(names, models.values(), strict=True)]


def analyze(model: "Trained", path: str, settings: Mapping[str, Any]) -> list[Any]:
    """Return the probabilities that are not rounded to 0%, the network's input and its Grad-CAM map.

    Raises:
        UserError: the picture cannot be read.
    """
    from cifarnet.inference.figures import overlay

    (answer,) = model.answers([path], **settings)
    if answer.error:
        raise UserError(answer.error)
    images = [answer.pixels, overlay(answer.pixels, model.heat(answer))]
    factor = max(1, SIDE // len(answer.pixels))  # each pixel becomes a square
    shown = dict(answer.ranked[:1]) | {name: value for name, value in answer.ranked if value >= 0.005}
    return [shown, *(image.repeat(factor, axis=0).repeat(factor, axis=1) for image in images)]


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
    ends = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]
    with interrupting(ends), serving(paths, overrides) as address:
        print(f"Open {address} in a browser. Press Ctrl-C to stop.", flush=True)
        threading.Event().wait()


def main() -> None:
    """Run `python -m cifarnet.demo`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
