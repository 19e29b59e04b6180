"""A trained network that predicts the probabilities of its classes for image files or images in memory."""

import copy
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from cifarnet.checkpoint import HUB_SETTINGS, Checkpoint
from cifarnet.errors import UserError
from cifarnet.inference.gradcam import grad_cam
from cifarnet.records.evaluation import Evaluation
from cifarnet.records.json_file import JsonFile
from cifarnet.records.record import Record
from cifarnet.schema import Range, check
from cifarnet.system.hardware import cores

if TYPE_CHECKING:  # imports Lightning, which takes seconds
    from cifarnet.data.decoding import Picture
    from cifarnet.inference.predictor import Predictor

Temperature = Annotated[float, Range(above=0)] | Literal["evaluation"] | None


class Prediction(NamedTuple):
    """The prediction for one picture.

    Attributes:
        source: the path of the picture; None for a picture in memory.
        label: the class with the highest probability.
        probability: the probability of that class.
        probabilities: the probabilities of all classes, in descending order.
    """

    source: str | None
    label: str
    probability: float
    probabilities: dict[str, float]


class Answer(NamedTuple):
    """The network's output for one picture.

    Attributes:
        source: the path of the picture, or the picture itself.
        error: an error message if the picture cannot be read; the other attributes are then empty.
        pixels: the network's input, uint8 [size, size, 3].
        logits: float32 [num_classes], on the CPU.
        ranked: the classes and their probabilities, in descending order.
    """

    source: "Picture"
    error: str = ""
    pixels: np.ndarray = np.empty(0)
    logits: Tensor = torch.empty(0)
    ranked: Sequence[tuple[str, float]] = ()


class Calibration(TypedDict):
    """A temperature, and the test-time augmentation with which it was fitted."""

    tta: str
    temperature: float


@dataclass(kw_only=True)
class HubSettings(JsonFile):
    """The calibration that is stored in a folder in the Hugging Face format."""

    evaluation: Calibration | None = None


class NetworkAndNames(NamedTuple):
    network: nn.Module
    class_names: list[str]


class Trained(NetworkAndNames):
    """A trained network and the names of its classes, as a pair that predicts the classes of pictures.

    Attributes:
        network: images [B, 3, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; in eval mode, on the CPU.
        class_names: the names of the classes in the order of the logits.
        checkpoint: the checkpoint without its weights: the image size, the epoch, and so on.
        tested: the test-time augmentation "tta" and the "precision" of the run's test.
    """

    checkpoint: Checkpoint
    tested: dict[str, Any]

    def predict(self, images: "Picture | Iterable[Picture]", **settings: Any) -> list[Prediction]:
        """Predict the class of each picture.

        Args:
            images: one picture or several. A picture is a path; a folder, which stands for the image files in and below
                it; a Pillow image; a NumPy array [H, W] or [H, W, 1, 3 or 4]; or a tensor [1, 3 or 4, H, W]. Arrays are
                uint8, or float in [0, 1], which is rounded to 8 bits; an array with one more dimension is a batch.
                Pictures of any size are scaled and cropped to the image size of training, as with data=folder.
            settings: the settings of `answers`.

        Returns:
            A prediction for each picture, in order. The files of a folder are sorted.

        Raises:
            UserError: a picture cannot be read, or a setting cannot be used.
        """
        predictions = []
        for answer in self.answers(images, **settings):
            if answer.error:
                raise UserError(answer.error)
            source = os.fspath(answer.source) if isinstance(answer.source, str | os.PathLike) else None
            predictions.append(Prediction(source, *answer.ranked[0], dict(answer.ranked)))
        return predictions

    def features(self, images: "Picture | Iterable[Picture]", **settings: Any) -> Tensor:
        """Return the features of pictures: the inputs of the network's last layer, without test-time augmentation.

        They are computed with the precision of training; `precision="32-true"` computes them in float32.

        Args:
            images: pictures, as for `predict`, such as paths, or images as the network takes them.
            settings: `batch_size`, `workers`, `precision` and `accelerator`, as for `answers`.

        Returns:
            float32 [N, D], on the CPU, in the order of the pictures.

        Raises:
            UserError: as for `predict`; also if the network has no linear or convolutional layer.
        """
        from cifarnet.recipes.backbone import head_inputs  # imports Lightning, which takes seconds

        with head_inputs(self.network) as inputs:  # the hook is also in the predictor's copy of the network
            self.predict(images, tta="none", **settings)
        return torch.cat(inputs) if inputs else torch.empty(0, 0)

    def answers(
        self,
        sources: "Picture | Iterable[Picture]",
        *,
        batch_size: int = 256,
        workers: int | None = None,
        temperature: Temperature = None,
        **settings: Any,
    ) -> Iterator[Answer]:
        """Yield the network's output for each picture, in order. While it computes, more pictures are decoded.

        Each output depends only on its own picture: test-time augmentation is applied to all pictures, even if the run
        applied it to only a part of its test images (`tta_share`).

        Args:
            sources: pictures, as for `predict`.
            batch_size: the number of pictures in a batch.
            workers: the number of threads that decode pictures; None: one per core.
            temperature: the number that divides the logits; "evaluation" uses the temperature that
                `cifarnet.evaluate` fitted.
            settings: `tta`: "none", "mirror" or "mirror_translate" (None: as in the run's test); `precision` (None: as
                in training) and `accelerator`, as for Lightning's Trainer.

        Raises:
            UserError: a setting cannot be used, or the network's outputs are not finite.
        """
        from cifarnet.data.decoding import decode_all, expand_folders

        divisor = self.temperature(temperature, settings.get("tta"))
        predictor = self.predictor(**settings)
        size = self.checkpoint.image_size
        decoded = decode_all(list(expand_folders(sources)), size, batch_size, workers or cores())
        while batch := list(itertools.islice(decoded, batch_size)):
            images = [pixels for _, pixels in batch if not isinstance(pixels, str)]
            logits = torch.empty(0)
            if images:
                logits = predictor(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[1].cpu()
            if not logits.isfinite().all():
                path, remedy = self.checkpoint.path, "its training diverged. Use another checkpoint."
                raise UserError(f"{path}: the network's outputs are not finite: {remedy}")
            rows = iter(logits)
            for source, pixels in batch:
                if isinstance(pixels, str):
                    yield Answer(source, pixels)
                else:
                    row = next(rows)
                    yield Answer(source, "", pixels, row, self._ranked(row, divisor))

    def predictor(self, **settings: Any) -> "Predictor":
        """Return a `Predictor` of a copy of the network, which it may move to another device.

        Args:
            settings: the settings of `Predictor`. The default, also for None, is the precision of training and the
                test-time augmentation of the run's test, applied to all images.
        """
        from cifarnet.inference.predictor import Predictor  # imports Lightning, which takes seconds

        chosen = {name: value for name, value in settings.items() if value is not None}
        channels_last = self.checkpoint.channels_last
        return Predictor(copy.deepcopy(self.network), channels_last=channels_last, **self.tested | chosen)

    def heat(self, answer: Answer) -> np.ndarray:
        """Return the Grad-CAM map of the predicted class, float [H, W] from 0 to 1.

        It is computed in float32 on the CPU, without test-time augmentation.
        """
        image = torch.tensor(answer.pixels).permute(2, 0, 1)[None]
        return grad_cam(self.network, image, answer.logits.argmax()[None])[0].numpy()

    def _ranked(self, logits: Tensor, temperature: float) -> list[tuple[str, float]]:
        """Return the classes and their probabilities for logits [num_classes], in descending order."""
        values, order = (logits.double() / temperature).softmax(0).sort(descending=True, stable=True)
        return [(self.class_names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]

    def temperature(self, value: Temperature, tta: str | None = None) -> float:
        """Return the value of a setting `temperature` as a number.

        Args:
            value: a number; None for 1; or "evaluation" for the temperature that `cifarnet.evaluate` fitted to this
                checkpoint with the same test-time augmentation.
            tta: as for `answers`.

        Raises:
            UserError: the value cannot be used, or no temperature has been fitted.
        """
        check("temperature", value, Temperature)
        if value != "evaluation":
            return 1.0 if value is None else float(value)
        tta = tta or self.tested["tta"]
        for calibration in self.calibrations():
            if calibration["tta"] == tta:
                return self.temperature(calibration["temperature"])
        raise self._not_fitted("temperature=evaluation", "temperature", f"tta={tta}")

    def conformal_threshold(self, alpha: float, tta: str | None = None) -> float | None:
        """Return the threshold for `conformal_set` that the last evaluation fitted with this `alpha`; None if it is
        infinite, because there were too few validation images.

        Args:
            alpha: the largest allowed probability that a set lacks the true class.
            tta: as for `answers`.

        Raises:
            UserError: the last evaluation of these weights has no threshold for this `alpha` and `tta`.
        """
        tta, evaluation = tta or self.tested["tta"], self.evaluation()
        measured = evaluation.conformal if evaluation and evaluation.tta == tta else None
        if measured is None or measured["alpha"] != alpha:
            raise self._not_fitted(f"conformal={alpha}", "threshold", f"alpha={alpha} tta={tta}")
        return measured["sets"]["LAC"]["threshold"]

    def conformal_set(self, logits: Tensor, threshold: float | None) -> list[str]:
        """Return the classes of a picture's conformal set (LAC), in descending order of their probabilities.

        They are the most probable class, and all classes for which 1 - probability is at most the threshold. The
        probabilities are not changed by a temperature.

        Args:
            logits: the `logits` of an `Answer`, float32 [num_classes].
            threshold: the result of `conformal_threshold`.
        """
        ranked = enumerate(self._ranked(logits, 1.0))
        return [name for rank, (name, p) in ranked if rank == 0 or threshold is None or 1 - p <= threshold]

    def _not_fitted(self, setting: str, what: str, options: str) -> UserError:
        """Return the error for a setting whose value the last evaluation did not fit."""
        path = self.checkpoint.path
        command = f"python -m cifarnet.evaluate {path}{' data=…' * path.is_dir()} {options} corruptions=false"
        problem = f"{setting}: no {what} was fitted to {path} with {options}"
        return UserError(f"{problem}. Evaluate it first (with data.root=… for your own pictures): {command}")

    def calibrations(self) -> list[Calibration]:
        """Return the fitted temperatures: the one in a Hugging Face folder, and the one of the last evaluation."""
        path, evaluation = self.checkpoint.path, self.evaluation()
        fitted = [HubSettings.read(path / HUB_SETTINGS).evaluation] if path.is_dir() else []
        if evaluation and evaluation.temperature is not None:
            fitted.append({"tta": evaluation.tta, "temperature": evaluation.temperature})
        return [calibration for calibration in fitted if calibration is not None]

    def run_record(self) -> Record | None:
        """Return the record of the run; None if the run is unfinished, or the checkpoint is not in a run's folder."""
        folder = self.checkpoint.run_folder
        file = None if folder is None else folder / "metrics.json"
        return Record.read(file) if file is not None and file.exists() else None

    def record(self) -> Record | None:
        """Return the record of the run if it describes these weights, tested on all test images."""
        record, saved_after = self.run_record(), (self.checkpoint.epoch, self.checkpoint.step)
        is_same = record and not record.partial and (record.tested_epoch, record.tested_step) == saved_after
        return record if is_same else None

    def evaluation(self) -> Evaluation | None:
        """Return the record of the last evaluation if it describes these weights."""
        file = self.checkpoint.folder_for("evaluation") / "metrics.json"
        evaluation = Evaluation.read(file) if file.exists() else None
        weights = self.checkpoint.path.name, self.checkpoint.epoch
        is_same = evaluation and (Path(evaluation.checkpoint).name, evaluation.epoch) == weights
        return evaluation if is_same else None


def load(path: str | Path, classes: Sequence[Any] = ()) -> Trained:
    """Load the trained network of a checkpoint, in eval mode on the CPU, with the names of its classes.

        classifier = cifarnet.load("speedrun")  # or a run: "lightning_logs/baseline/<date_time>"
        classifier.predict("picture.jpg")  # also several pictures, a folder, Pillow images, arrays

        network, class_names = cifarnet.load("lightning_logs/baseline/<date_time>")
        network(images).argmax(1)  # images: uint8 or float in [0, 1], [B, 3, 32, 32]

    Args:
        path: a run's folder (its best checkpoint, or the last one if nothing was validated), a checkpoint file, a
            folder in the Hugging Face format, or the name of a trained network of this package, such as "speedrun".
        classes: network classes (or functions that return a network) from outside this project to allow in the
            checkpoint. Others are refused, so that a checkpoint from a stranger cannot run code.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it uses a class that is not allowed.
    """
    checkpoint = Checkpoint.open(path)
    trained = Trained(checkpoint.network(classes), checkpoint.class_names)
    trained.checkpoint = replace(checkpoint, weights={}, content={})
    trained.tested = {"tta": checkpoint.tta, "precision": checkpoint.precision}
    return trained
