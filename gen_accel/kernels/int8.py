"""Attention with products of 8 bits in C++, for generating on a CPU; rounds, so only by its name."""

from gen_accel.kernels.quantised import kernel

__all__ = ["kernel"]
