"""Monarch Mixer encoders for MosaicML llm-foundry, Composer and Streaming."""

__version__ = "0.1.0"
