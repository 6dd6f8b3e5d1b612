"""Attention methods, one a file, each a frozen dataclass."""
