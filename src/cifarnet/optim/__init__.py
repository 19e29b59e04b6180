"""What torch lacks: Muon for convolutions."""

from cifarnet.optim.muon import Muon

__all__ = ["Muon"]
