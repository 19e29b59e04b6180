"""Optimizers and schedules that torch does not provide."""

from cifarnet.optim.muon import Muon

__all__ = ["Muon"]
