# A service with kernels: sparse_inference. The kernels are compiled for every instruction set and choose at start, so
# one image serves every x86-64 machine; build it on ARM for ARM. From the repository root:
#
#   docker build -f deploy/images/kernels.Dockerfile --build-arg SERVICE=sparse_inference -t autoglm/sparse-inference:0.1.0 .
#
# EXTRA_GROUP=onnx adds ONNX Runtime, for workers whose model is an .onnx file.
# No HEALTHCHECK: Kubernetes probes gRPC health itself, compose.yaml runs `python -m services.chassis.probe`.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG SERVICE=sparse_inference
ARG EXTRA_GROUP=${SERVICE}
WORKDIR /build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# Dependency groups need pip 25.1. The environment itself gets no pip: what is not there cannot install anything.
RUN pip install --no-cache-dir --disable-pip-version-check "pip>=25.1" && python -m venv --without-pip /opt/autoglm/venv
COPY pyproject.toml constraints.txt ./
COPY sdk sdk
RUN pip --python /opt/autoglm/venv/bin/python install --no-cache-dir --constraint constraints.txt --group ${SERVICE} --group ${EXTRA_GROUP} ./sdk
# After the dependencies, which change less often and are quicker.
COPY kernels kernels
RUN pip --python /opt/autoglm/venv/bin/python install --no-cache-dir --no-deps ./kernels
WORKDIR /opt/autoglm/app
COPY services/__init__.py services/__main__.py services/
COPY services/chassis services/chassis
COPY services/${SERVICE} services/${SERVICE}
COPY engine engine
# Compiled here, as nothing can be written later.
RUN python -m compileall -q /opt/autoglm/app

FROM python:${PYTHON}
ARG SERVICE=sparse_inference
LABEL org.opencontainers.image.title="Open-AutoGLM Mesh: ${SERVICE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=build /opt/autoglm /opt/autoglm
# The one place that may be written to: packed weights and digests, which can be made again.
RUN install -d -o 10001 -g 10001 /var/lib/autoglm
VOLUME ["/var/lib/autoglm"]
ENV PATH="/opt/autoglm/venv/bin:${PATH}" \
    PYTHONUNBUFFERED="1" \
    PYTHONDONTWRITEBYTECODE="1" \
    HOME="/var/lib/autoglm" \
    AUTOGLM_SERVICE="${SERVICE}" \
    AUTOGLM_BIND="0.0.0.0" \
    AUTOGLM_GRPC_PORT="50051" \
    AUTOGLM_METRICS_PORT="9090" \
    AUTOGLM_CACHE_DIR="/var/lib/autoglm/engine"
WORKDIR /opt/autoglm/app
USER 10001:10001
EXPOSE 50051 9090
# Exec form: the program is process 1 and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "services"]
