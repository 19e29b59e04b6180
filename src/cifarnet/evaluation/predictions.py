"""The prediction for each test image, as rows of a table."""

from typing import Any

from cifarnet.data import ImageDataModule
from cifarnet.inference.predictor import Predictions


def per_image(test: Predictions, data: ImageDataModule, temperature: float = 1.0) -> list[dict[str, Any]]:
    """Return a row for each test image, in the order of the predictions.

    Args:
        temperature: the number that divides the logits.

    Returns:
        Rows with the image (the path of its file relative to `data.root`, or its position among the test images), the
        true class, the predicted class and its probability, the cross-entropy, and whether the prediction is correct.
    """
    names, files, index = data.class_names, data.source.files.get("test"), test.index.tolist()
    log_probabilities = (test.logits.double() / temperature).log_softmax(1)
    largest, predicted = log_probabilities.max(1)
    columns = {
        "image": [files[i] for i in index] if files else index,
        "class": [names[label] for label in test.labels.tolist()],
        "predicted": [names[label] for label in predicted.tolist()],
        "probability": largest.exp().tolist(),
        "loss": (0 - log_probabilities.gather(1, test.labels[:, None])).flatten().tolist(),  # 0 and not -0
        "correct": (predicted == test.labels).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
