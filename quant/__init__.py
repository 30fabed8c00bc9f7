"""Quantized weights: codes and scales, and the layers that run on them."""
