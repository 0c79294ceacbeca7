"""Triton kernels of the ops, one file per op. They are imported only where they can run."""
