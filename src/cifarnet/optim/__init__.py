"""Optimizers and schedules that torch lacks."""

from cifarnet.optim.muon import Muon

__all__ = ["Muon"]
