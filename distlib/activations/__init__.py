"""Activation memory: which results of the forward are kept for the backward, recomputed, or moved out of the way."""

from distlib.activations.apply import checkpoint_activations
from distlib.activations.report import ActivationReport

__all__ = ["ActivationReport", "checkpoint_activations"]
