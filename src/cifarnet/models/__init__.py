"""Networks: plain nn.Modules from pixels to logits."""

from cifarnet.models.cnn import CNN
from cifarnet.models.construct import construct, try_on
from cifarnet.models.normalize import Normalize
from cifarnet.models.speednet import SpeedNet

__all__ = ["CNN", "Normalize", "SpeedNet", "construct", "try_on"]
