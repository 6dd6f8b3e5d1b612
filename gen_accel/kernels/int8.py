"""Attention with products of 8 bits in C++, for generating on a CPU. It rounds, so that only its
name asks for it."""

from gen_accel.kernels.quantised import kernel

__all__ = ["kernel"]
