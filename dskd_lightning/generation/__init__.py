"""Responses from a model: generator, sampling, stop tokens; for training, evaluation and commands alike."""

from dskd_lightning.generation.generator import Generation, GenerationSettings, Generator

__all__ = ["Generation", "GenerationSettings", "Generator"]
