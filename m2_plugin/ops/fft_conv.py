"""Long convolution by FFT. It has no kernel of its own: PyTorch computes it on every device."""

from m2_plugin.ops.reference.fft_conv import fft_conv, filter_spectrum, spectral_conv

__all__ = ["fft_conv", "filter_spectrum", "spectral_conv"]
