"""A trained network put to use: from image files, or images in memory, to the probabilities of its classes."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cifarnet import checkpoint
from cifarnet.config import check_range
from cifarnet.errors import UserError
from cifarnet.inference.decoding import Picture, decoded, listed
from cifarnet.inference.gradcam import grad_cam
from cifarnet.schema import Pixels
from cifarnet.system.hardware import cores

if TYPE_CHECKING:
    from cifarnet.inference.predictor import Predictor

# of records, what is used elsewhere, and what it is
RECORDED = dict.fromkeys(("name", "precision", "tta", "finished"), str)
RECORDED |= dict.fromkeys(("test_accuracy", "test_accuracy_one_view", "seconds"), float)
RECORDED |= dict.fromkeys(("data", "hardware", "versions"), dict) | {
    "seed": int,
    "overrides": list,
    "git_commit": str | None,
}
EVALUATED = dict.fromkeys(("checkpoint", "finished", "tta", "precision"), str)
EVALUATED |= {"data": dict, "test": dict, "temperature": float | None}


class Prediction(NamedTuple):
    """Of one image: where it lies (None: in memory), its likeliest class, and all classes, the likeliest first."""

    source: str | None
    label: str
    probability: float
    probabilities: dict[str, float]


class Answer(NamedTuple):
    """To one image: logits, float32 [num_classes] on the CPU, and what the network saw, uint8 [size, size, 3]; or None
    and why it could not be read."""

    source: Picture
    logits: Tensor | None
    pixels: np.ndarray | None
    error: str = ""


class NetworkAndNames(NamedTuple):
    network: nn.Module
    class_names: list[str]


class Trained(NetworkAndNames):
    """What `cifarnet.load` gives: a pair of the network and the names of its classes, that can look at pictures.

    Attributes:
        network: images [B, 3, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; in eval mode, on the CPU.
        class_names: in the order of the logits.
        path: the checkpoint file.
        image_size: height and width, in pixels, of the images that it was trained on.
        epoch: after which it was saved, from 1.
        step: of the optimizer, after which it was saved.
        tested: how the run was tested: "tta", and the "precision" of the arithmetic.
        model: the network's settings, with its class as `_target_`.
    """

    path: Path
    image_size: int
    epoch: int
    step: int
    tested: dict[str, Any]
    channels_last: bool
    model: dict[str, Any]

    def predict(
        self, images: Picture | Iterable[Picture], *, temperature: float | str | None = None, **settings: Any
    ) -> list[Prediction]:
        """What the network takes each picture for.

        Args:
            images: one or several of: a path; a folder, which stands for the images in and below it; an image of
                Pillow's; an array of numpy's, [H, W] or [H, W, 1, 3 or 4], or of torch's, [1, 3 or 4, H, W], uint8 or
                float in [0, 1], which is rounded to 8 bits. An array with a dimension more is several. Of any size:
                they are scaled and cropped to `image_size`, as the images of a folder are for training.
            temperature: divides the logits; "evaluation": the one that evaluate fitted on validation images.
            settings: those of `answers`.

        Returns:
            A prediction for each image, in their order; a folder's are sorted.

        Raises:
            UserError: one cannot be read, or a setting cannot be used.
        """
        divisor = self.temperature(temperature, settings.get("tta"))
        predictions = []
        for answer in self.answers(images, **settings):
            if answer.logits is None:
                raise UserError(answer.error)
            ranked = self.ranked(answer.logits, divisor)
            source = os.fspath(answer.source) if isinstance(answer.source, str | os.PathLike) else None
            predictions.append(Prediction(source, *ranked[0], dict(ranked)))
        return predictions

    def answers(
        self,
        sources: Picture | Iterable[Picture],
        *,
        tta: str | None = None,
        batch_size: int = 256,
        workers: int | None = None,
        precision: str | int | None = None,
        accelerator: str = "auto",
    ) -> Iterator[Answer]:
        """The network's answers, in order. While it is at work on a batch, the next ones are decoded.

        An answer depends on its picture alone: every one is looked at with `tta`, whatever share of its test images
        the run looked at again.

        Args:
            sources: as `predict` takes them.
            tta: test-time augmentation, "none", "mirror" or "mirror_translate"; None: as the run was tested.
            batch_size: images at a time.
            workers: threads that decode; None: one a core.
            precision, accelerator: as of Lightning's Trainer; None: as trained.

        Raises:
            UserError: a setting cannot be used, or the answers are no finite numbers, one a class.
        """
        predictor = self.predictor(tta=tta, precision=precision, accelerator=accelerator)
        batch: list[tuple[Picture, np.ndarray | str]] = []
        for part in decoded(list(listed(sources)), self.image_size, batch_size, workers or cores()):
            batch.append(part)
            if len(batch) == batch_size:
                yield from self._answered(predictor, batch)
                batch = []
        yield from self._answered(predictor, batch)

    def predictor(
        self, *, tta: str | None = None, precision: str | int | None = None, accelerator: str = "auto"
    ) -> "Predictor":
        """The network at work: images, uint8 [B, 3, H, W] -> logits of one view, and those with `tta`.

        Settings and errors are those of `answers`.
        """
        from cifarnet.inference.predictor import Predictor  # on first use: Lightning takes seconds

        return Predictor(
            copy.deepcopy(self.network),  # this one stays where it is, and as it is
            tta=self.tested["tta"] if tta is None else tta,
            channels_last=self.channels_last,
            precision=self.tested["precision"] if precision is None else precision,
            accelerator=accelerator,
        )

    def _answered(
        self, predictor: Callable[[Tensor], tuple[Tensor, Tensor]], batch: Sequence[tuple[Picture, np.ndarray | str]]
    ) -> Iterator[Answer]:
        images = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        rows = iter(())
        if images:
            logits = predictor(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[1].cpu()
            if logits.shape != (len(images), len(self.class_names)) or not logits.isfinite().all():
                raise UserError(f"{self.path}: the network's answers are not finite numbers, one a class.")
            rows = iter(logits)
        for source, pixels in batch:
            unread = isinstance(pixels, str)
            yield Answer(source, None, None, pixels) if unread else Answer(source, next(rows), pixels)

    def heat(self, pixels: np.ndarray, logits: Tensor) -> np.ndarray:
        """Where the network looked, in a picture as it saw it, for the likeliest class: Grad-CAM, float [H, W] from 0
        to 1, of the one view, in float32 on the CPU.

        Args:
            pixels, logits: of an `Answer`.
        """
        image = torch.tensor(pixels).permute(2, 0, 1)[None]
        return grad_cam(self.network, image, logits.argmax()[None])[0].numpy()

    def ranked(self, logits: Tensor, temperature: float = 1.0) -> list[tuple[str, float]]:
        """Logits [num_classes] as classes and their probabilities, the likeliest first."""
        values, order = (logits.double() / temperature).softmax(0).sort(descending=True, stable=True)
        return [(self.class_names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]

    def temperature(self, asked: float | str | None, tta: str | None = None) -> float:
        """The number that `temperature=` asks for; "evaluation": what evaluate fitted for this checkpoint and `tta`."""
        if asked != "evaluation":
            if isinstance(asked, bool | str) or not 0 < (1 if asked is None else asked) < math.inf:
                raise UserError(f"temperature={asked}: give a number above 0, or evaluation.")
            return 1.0 if asked is None else float(asked)
        file = folder_for(self.path, "evaluation") / "metrics.json"
        command = f"python -m cifarnet.evaluate {self.path}" + (" data=…" if self.path.is_dir() else "")
        tta = self.tested["tta"] if tta is None else tta
        if (shared := self.shared_evaluation()) and shared["tta"] == tta:
            return shared["temperature"]
        try:
            record = json.loads(file.read_text("utf-8"))
            fitted_with, named, found = record["tta"], Path(record["checkpoint"]).name, record["temperature"]
            if found is not None and not (isinstance(found, float) and 0 < found < math.inf):
                raise ValueError(found)
        except FileNotFoundError:
            raise UserError(f"temperature=evaluation: there is no {file}. Fit one: {command}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"temperature=evaluation: {file} is damaged ({error}). Write it anew: {command}") from None
        if found is None:
            raise UserError(f"temperature=evaluation: {file} has none, since the run had no validation images.")
        if (fitted_with, named) != (tta, self.path.name):
            raise UserError(
                f"temperature=evaluation: that in {file} was fitted to {named} with tta={fitted_with}, and this is "
                f"{self.path.name} with tta={tta}. Fit it anew: {command} tta={tta}"
            )
        return found

    def shared_evaluation(self) -> dict[str, Any]:
        """What a folder that was shared says of its maker's evaluation: the "temperature", fitted with which "tta"."""
        if not self.path.is_dir():
            return {}
        file = self.path / checkpoint.SHARED[1]
        told = json.loads(file.read_text("utf-8")).get("evaluation") or {}
        try:
            tta, temperature = (told["tta"], told["temperature"]) if told else ("", 1.0)
            if not isinstance(tta, str) or not isinstance(temperature, float) or not 0 < temperature < math.inf:
                raise TypeError("its evaluation")
        except (TypeError, KeyError) as error:
            raise UserError(f"{file} is damaged ({type(error).__name__}: {error}). Download it anew.") from None
        return told

    def record(self) -> dict[str, Any]:
        """What the run's `metrics.json` says, if it is of these weights and of a whole test; else nothing."""
        if self.path.parent.name != "checkpoints":
            return {}
        record = self._written(self.path.parent.with_name("metrics.json"), "tested_epoch", RECORDED)
        of_these = not record.get("partial") and record.get("tested_step", self.step) == self.step
        return record if of_these else {}

    def evaluation(self) -> dict[str, Any]:
        """What evaluate's `metrics.json` says, if it is of these weights and the run's own images; else nothing."""
        file, run = folder_for(self.path, "evaluation") / "metrics.json", self.record()
        record = self._written(file, "epoch", EVALUATED)
        if not record or Path(record["checkpoint"]).name != self.path.name:
            return {}
        later = not run or record["finished"] >= run["finished"]
        return record if later and (not run or record["data"].get("sha256") == run["data"].get("sha256")) else {}

    def _written(self, file: Path, epoch: str, needed: Mapping[str, Any]) -> dict[str, Any]:
        try:
            record = json.loads(file.read_text("utf-8"))
            if wrong := [key for key, kind in needed.items() if not isinstance(record[key], kind)]:
                raise TypeError(f"its {wrong[0]}")
            return record if record[epoch] == self.epoch else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged ({type(error).__name__}: {error}). Remove it, or write it anew."
            ) from None


def load(path: str | Path, classes: Sequence[Any] = ()) -> Trained:
    """The trained network of a checkpoint, in eval mode on the CPU, and the names of its classes.

        classifier = cifarnet.load("lightning_logs/baseline/<date_time>")
        classifier.predict("picture.jpg")  # or several, a folder, images of Pillow's, arrays

        network, class_names = cifarnet.load("lightning_logs/baseline/<date_time>")
        network(images).argmax(1)  # images: uint8 or float in [0, 1], [B, 3, 32, 32]

    Args:
        path: a checkpoint file, or a run's folder (then its best checkpoint, or the last one where nothing
            was validated).
        classes: network classes (or functions that make one) from outside this project that the checkpoint may ask for.
            Others are refused: a checkpoint from a stranger can run no code.

    Raises:
        UserError: no such file, not a checkpoint, or a class that is not listed.
    """
    path = checkpoint.find(path)
    return of(checkpoint.read(path), path, classes)


def of(content: Mapping[str, Any], path: Path, classes: Sequence[Any] = ()) -> Trained:
    """The same, of what `checkpoint.read` returned for this path."""
    trained = Trained(*checkpoint.network(content, path, classes))
    trained.path, trained.epoch = path, content["epoch"] + 1
    trained.step = content["global_step"]
    trained.tested = {key: value for key, value in as_tested(content).items() if key != "tta_share"}
    trained.image_size = int(content["hyper_parameters"]["image_size"])
    check_range(f"{path}: image_size", trained.image_size, Pixels)
    trained.channels_last = bool(content["resolved"].get("channels_last", True))
    trained.model = content["resolved"]["model"]
    return trained


def as_tested(content: Mapping[str, Any]) -> dict[str, Any]:
    """Test-time augmentation and precision of the run's own test, of what `checkpoint.read` returned."""
    module = content["resolved"]["module"]
    saved = {"tta": module.get("tta", "none"), "tta_share": module.get("tta_share", 1.0)}
    return saved | {"precision": content["hyper_parameters"]["precision"]}


def folder_for(path: Path, name: str) -> Path:
    """Where a command writes about a checkpoint: in its run's folder, or beside a file that was moved out of it."""
    path = path.resolve() if path.is_dir() else path  # it may be called "."
    if path.parent.name == "checkpoints":
        return path.parent.with_name(name)
    return path.with_name(f"{path.name if path.is_dir() else path.stem}_{name}")
