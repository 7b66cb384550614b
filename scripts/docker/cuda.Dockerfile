# loratune for NVIDIA GPUs: torch brings CUDA's libraries, and the host has the driver. After `make release`:
#
#     docker build --file scripts/docker/cuda.Dockerfile --tag loratune:cuda .
#     docker run --rm --gpus all --read-only --tmpfs /tmp:exec --user "$(id -u):$(id -g)" --volume "$PWD:/work" \
#         loratune:cuda train config.yaml
#
# The root may be read-only: everything is written to /work, which holds config, rows and models, and to /tmp. Caches are
# in /work/.cache. Triton, which torch.compile and Liger use, needs the C compiler.
FROM python:3.13-slim-trixie AS installed
ARG WHEEL=manylinux_2_28_x86_64
COPY dist/*-none-${WHEEL}.whl /dist/
RUN python -m venv /opt/loratune \
    && for wheel in /dist/*.whl; do \
        /opt/loratune/bin/pip install --no-cache-dir "${wheel}[report,sweep]"; done

FROM python:3.13-slim-trixie
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=installed /opt/loratune /opt/loratune
RUN useradd --uid 1000 --no-create-home --home-dir /work loratune && install --directory --owner=1000 --group=1000 /work
ENV PATH=/opt/loratune/bin:$PATH HOME=/work XDG_CACHE_HOME=/work/.cache PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["loratune"]
CMD ["--help"]
