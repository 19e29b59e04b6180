"""What the sections of an evaluation measure: a network, its data and its predictions."""

from typing import Any, NamedTuple

from matplotlib.figure import Figure
from omegaconf import DictConfig

from cifarnet.data import ImageDataModule
from cifarnet.evaluation.public_sets import PublicSets
from cifarnet.inference.ensemble import Ensemble
from cifarnet.inference.predictor import Predictions, Predictor

Section = tuple[Any, dict[str, Figure]]  # plain data for the record, or None if not measured; and figures by name


class Subject(NamedTuple):
    """A network, or an ensemble of several networks, and its predictions for the test and validation images.

    Attributes:
        predictor: the network with the precision and the test-time augmentation of the evaluation. An ensemble has no
            `network`: a section that needs one checks `isinstance(predictor, Predictor)`.
        data: the images; those of the training set are not augmented in `data.source`.
        public: the public test sets to evaluate on.
        config: the settings in `configs/evaluate.yaml`.
        test, val: the predictions; `val` is None without validation images.
    """

    predictor: Predictor | Ensemble
    data: ImageDataModule
    public: PublicSets
    config: DictConfig
    test: Predictions
    val: Predictions | None
