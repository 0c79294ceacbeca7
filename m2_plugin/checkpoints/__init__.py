"""Checkpoints: everything that reads or writes weights and model folders."""
