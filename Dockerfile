# medssl from a wheelhouse; but for the base image nothing is downloaded:
#   scripts/wheelhouse wheels && docker build --tag medssl .
# The Python of the base image is that of the wheels. Torch brings its own CUDA, the host the driver.
#   docker run --rm --network none --read-only --tmpfs /tmp --gpus all --shm-size 1g \
#     --user "$(id -u):$(id -g)" -v "$PWD/scans:/scans:ro" -v "$PWD/work:/work" medssl train /scans
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
RUN --mount=type=bind,source=wheels,target=/wheels \
    python3 -m venv /opt/medssl \
    && /opt/medssl/bin/pip install --no-cache-dir --disable-pip-version-check \
       --no-index --find-links /wheels "medssl[dicom,export]"
ENV PATH=/opt/medssl/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["medssl"]
CMD ["--help"]
