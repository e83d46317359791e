"""Gated Slot Attention: reference recurrence, chunked PyTorch form, and the public ops."""

from .op import chunk_gsa, gsa
from .spec import GSASpec, SlotState

__all__ = ["GSASpec", "SlotState", "chunk_gsa", "gsa"]
