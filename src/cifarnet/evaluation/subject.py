"""What the sections of an evaluation measure: a network, its data and its predictions."""

import functools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig

from cifarnet.data import ImageDataModule
from cifarnet.evaluation.public_sets import PublicSets
from cifarnet.inference.ensemble import Ensemble
from cifarnet.inference.predictor import Predictions, Predictor

Section = tuple[Any, dict[str, Figure]]  # plain data for the record, or None if not measured; and figures by name


@dataclass
class Subject:
    """A network, or an ensemble of several networks, and its predictions for the test and validation images.

    Attributes:
        predictor: the network with the precision and the test-time augmentation of the evaluation. An ensemble has no
            `network`: `ensemble.check` refuses the settings of sections that need one.
        data: the images; those of the training set are not augmented in `data.source`.
        public: the public test sets to evaluate on.
        config: the settings in `configs/evaluate.yaml`; `output_dir` is the folder of the evaluation.
        test, val: the predictions; `val` is None without validation images.
    """

    predictor: Predictor | Ensemble
    data: ImageDataModule
    public: PublicSets
    config: DictConfig
    test: Predictions
    val: Predictions | None

    @functools.cached_property
    def features(self) -> tuple[Predictions, Predictions]:
        """The features of the training images, which are not augmented, and of the test images, in the orders of
        `data.source.train` and `test`, with their predictions without test-time augmentation."""
        assert isinstance(self.predictor, Predictor)
        train, test = self.data.loader(self.data.source.train, self.data.eval_batch_size), self.data.test_dataloader()
        train_features = self.predictor.embed(train, "features of the training images")
        return train_features, self.predictor.embed(test, "features of the test images")
