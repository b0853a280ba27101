"""Distil one language model into another with Dual-Space Knowledge Distillation."""

__version__ = "0.1.0"
