# syntax=docker/dockerfile:1
# NVIDIA's PyTorch image with this project in it. The image's torch, Transformer Engine and apex are used, never replaced:
# `make setup`'s own code puts a virtual environment on top and holds them with constraints (docs/container.md).
#
#     make image        # docker build, with the smoke test in it
#     make shell        # a shell in it, with the GPUs

# docs/container.md says why 26.06. The digest is of the index of amd64 and arm64; a tag can be moved, a digest can't.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1
# hadolint ignore=DL3006
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 AMOPO_EXTRAS=wandb
WORKDIR /opt/megatron-amopo

# What is installed depends on these files alone: a change of the code keeps the layer of dependencies.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_amopo/__init__.py megatron_amopo/
COPY tools/setup_environment tools/setup_environment
RUN python3 -m tools.setup_environment && rm -rf .venv-tools

COPY . .
ENV PATH=/opt/megatron-amopo/.venv/bin:${PATH}

# A user without rights, whose number the image's other users don't have; its home takes caches (Triton, Hugging Face).
ARG UID=10001
RUN useradd --create-home --uid "${UID}" --shell /bin/bash amopo
# By number: Kubernetes' runAsNonRoot doesn't look names up.
USER ${UID}

# Needs no GPU: what is imported is what the image brought, and the launch scripts' flags are Megatron's.
RUN python tools/check_container.py

ARG REVISION=unknown
LABEL org.opencontainers.image.title=megatron-amopo org.opencontainers.image.revision=${REVISION}
CMD ["bash"]
