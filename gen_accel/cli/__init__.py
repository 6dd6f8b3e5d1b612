"""gen-accel: each verb calls one function of the library and prints what it returns."""

# Imported for the verbs that each adds, in the order of `gen-accel --help`.
from gen_accel.cli import demo, generate, tune, show, estimate, metrics  # noqa: F401, I001
from gen_accel.cli import machine, share, web, train  # noqa: F401
from gen_accel.cli.app import app, main

__all__ = ["app", "main"]
