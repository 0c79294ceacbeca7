"""Triton kernels of the ops, a file for each op, of its name; imported only where they run."""
