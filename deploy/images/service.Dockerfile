# One service of plain Python: gateway, tokenizer, scheduler, cache, mesh. SERVICE is its folder below services/ and its
# dependency group in pyproject.toml. From the repository root:
#
#   docker build -f deploy/images/service.Dockerfile --build-arg SERVICE=gateway -t autoglm/gateway:0.1.0 .
#
# No HEALTHCHECK: Kubernetes probes gRPC health itself, compose.yaml runs `python -m services.chassis.probe`.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG SERVICE
WORKDIR /build
# Dependency groups need pip 25.1. The environment itself gets no pip: what is not there cannot install anything.
RUN pip install --no-cache-dir --disable-pip-version-check "pip>=25.1" && python -m venv --without-pip /opt/autoglm/venv
COPY pyproject.toml constraints.txt ./
COPY sdk sdk
RUN pip --python /opt/autoglm/venv/bin/python install --no-cache-dir --constraint constraints.txt --group ${SERVICE} ./sdk
WORKDIR /opt/autoglm/app
COPY services/__init__.py services/__main__.py services/
COPY services/chassis services/chassis
COPY services/${SERVICE} services/${SERVICE}
# Block names, digests and the GGUF reader's vocabulary: pure Python, used by scheduler, cache and tokenizer.
COPY engine engine
# Compiled here, as nothing can be written later.
RUN python -m compileall -q /opt/autoglm/app

FROM python:${PYTHON}
ARG SERVICE
LABEL org.opencontainers.image.title="Open-AutoGLM Mesh: ${SERVICE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=build /opt/autoglm /opt/autoglm
# The one place that may be written to; everything else works on a read-only root.
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
    AUTOGLM_CACHE_DIRECTORY="/var/lib/autoglm/cache"
WORKDIR /opt/autoglm/app
USER 10001:10001
EXPOSE 50051 9090
# Exec form: the program is process 1 and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "services"]
