# syntax=docker/dockerfile:1
#     docker build -t gen_accel .                                for CPUs
#     docker build -t gen_accel --build-arg DEVICE=cuda .        for NVIDIA GPUs
#     docker run --rm -v "$PWD:/work" gen_accel demo
ARG BASE=python:3.12-slim-bookworm
ARG DEVICE=cpu

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE CHANGELOG.md CITATION.cff ./
COPY gen_accel gen_accel
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE} AS cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# CUDA's libraries come with torch's wheels, the driver from the host.
FROM ${BASE} AS cuda
ENV TORCH_INDEX=https://pypi.org/simple \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM ${DEVICE} AS run
ARG EXTRAS=cli,quality,train
# Triton and `gen-accel build` compile on the machine that they run on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --index-url "$TORCH_INDEX" torch
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install "$(echo /wheels/*.whl)[$EXTRAS]"
# Any user may write there, so that --user works.
RUN useradd --uid 1000 --home-dir /cache --no-create-home user \
    && mkdir --mode 1777 /cache /work
ENV HOME=/cache \
    USER=user \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER 1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["gen-accel"]
CMD ["--help"]
