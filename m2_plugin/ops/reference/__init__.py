"""The ops in plain PyTorch: the truth, the CPU's path, and what the kernels fall back to."""
