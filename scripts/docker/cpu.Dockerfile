# loratune for CPUs. After `make release` (on ARM with --build-arg WHEEL=any, and slower):
#
#     docker build --file scripts/docker/cpu.Dockerfile --tag loratune:cpu .
#     docker run --rm --read-only --tmpfs /tmp --user "$(id -u):$(id -g)" --volume "$PWD:/work" \
#         loratune:cpu train config.yaml
#
# The root may be read-only: everything is written to /work, which holds config, rows and models, and to /tmp. Caches are
# in /work/.cache.
FROM python:3.13-slim-trixie AS installed
ARG WHEEL=manylinux_2_28_x86_64
COPY dist/*-none-${WHEEL}.whl /dist/
RUN python -m venv /opt/loratune \
    && for wheel in /dist/*.whl; do \
        /opt/loratune/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "${wheel}[report,sweep]"; done

FROM python:3.13-slim-trixie
COPY --from=installed /opt/loratune /opt/loratune
RUN useradd --uid 1000 --no-create-home --home-dir /work loratune && install --directory --owner=1000 --group=1000 /work
ENV PATH=/opt/loratune/bin:$PATH HOME=/work XDG_CACHE_HOME=/work/.cache PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["loratune"]
CMD ["--help"]
