"""Modifiers by llm-compressor's names. What they say is in config/recipe.py; the files here do it."""

from ..config.recipe import (
    AWQModifier,
    GPTQModifier,
    Mapping,
    QuantizationModifier,
    SmoothQuantModifier,
)

SmoothQuant, GPTQ, AWQ = SmoothQuantModifier, GPTQModifier, AWQModifier
AWQMapping = Mapping

__all__ = [
    "AWQ",
    "GPTQ",
    "AWQMapping",
    "AWQModifier",
    "GPTQModifier",
    "Mapping",
    "QuantizationModifier",
    "SmoothQuant",
    "SmoothQuantModifier",
]
