"""Optimizers that step a whole model in one pass over memory, gradient norms and the loss scaler. See docs/optim.md."""

from __future__ import annotations

from distlib.optim.norm import clip_grad_norm_, global_norm
from distlib.optim.optimizers import SGD, AdamW, Lion
from distlib.optim.scaler import GradScaler

__all__ = ["SGD", "AdamW", "GradScaler", "Lion", "clip_grad_norm_", "global_norm"]
