"""The formats of goldens, one a file: what a case holds, and how ours is held to it."""

from support.golden import (
    block_mixture,
    draft,
    neighborhood,
    piecewise,
    radial,
    residual,
    sol,
    sparge,
    sparse_linear,
    sparsed,
    turbo_sla,
    vsa,
)

_FILES = (
    *(radial, neighborhood, sparse_linear, block_mixture, piecewise, sol, sparge, draft),
    *(sparsed, residual, turbo_sla, vsa),
)
FORMATS = tuple(file.FORMAT for file in _FILES)
