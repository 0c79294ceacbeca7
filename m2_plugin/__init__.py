"""Monarch Mixer encoders for MosaicML llm-foundry."""

__version__ = "0.1.0"
