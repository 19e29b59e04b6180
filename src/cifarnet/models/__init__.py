"""Networks: plain nn.Modules from pixels to logits."""

from cifarnet.models.cnn import CNN
from cifarnet.models.construct import check_output, construct
from cifarnet.models.normalize import Normalize
from cifarnet.models.speednet import SpeedNet

__all__ = ["CNN", "Normalize", "SpeedNet", "check_output", "construct"]
