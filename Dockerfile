# The daemon in a container, on top of an image that already has vLLM.
#
#   docker build --build-arg VLLM_BASE_IMAGE=vllm/vllm-openai:v0.32.0 -t vllm-bootstrap .
#   docker run --gpus all --shm-size 16g -p 8000:8000 -v models:/cache -v state:/var/lib/vllm-bootstrap vllm-bootstrap
#
# The base needs Python 3.11 or newer with venv, and vLLM importable by ENGINE_PYTHON. The daemon lives in an environment
# of its own, so that neither can break the other's dependencies. Operation and upgrades: docs/operations.md.

ARG VLLM_BASE_IMAGE=vllm/vllm-openai:latest

FROM ${VLLM_BASE_IMAGE} AS build
COPY requirements-build.lock /src/
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r /src/requirements-build.lock
COPY pyproject.toml README.md LICENSE CHANGELOG.md /src/
COPY templates /src/templates
COPY vllm_bootstrap /src/vllm_bootstrap
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels /src

FROM ${VLLM_BASE_IMAGE}
ARG ENGINE_PYTHON=/usr/bin/python3
ARG BUILD_SHA=dev
ARG BUILD_TIME=dev

COPY requirements.lock /opt/vllm-bootstrap/
RUN python3 -m venv /opt/vllm-bootstrap \
    && /opt/vllm-bootstrap/bin/pip install --no-cache-dir --require-hashes -r /opt/vllm-bootstrap/requirements.lock
COPY --from=build /wheels /tmp/wheels
RUN /opt/vllm-bootstrap/bin/pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && rm -r /tmp/wheels \
    && ln -s /opt/vllm-bootstrap/bin/vllm-bootstrap /usr/local/bin/vllm-bootstrap
COPY scripts/container_init.py /opt/vllm-bootstrap/container_init.py

# HOST: a container's loopback cannot be reached from outside. Without a key configured the daemon makes one at its first
# start: `docker exec CONTAINER vllm-bootstrap keys show` prints it.
ENV HOST=0.0.0.0 \
    PORT=8000 \
    HF_HOME=/cache \
    BUILD_SHA=${BUILD_SHA} \
    BUILD_TIME=${BUILD_TIME} \
    VLLM_BOOTSTRAP_ENGINE_PYTHON=${ENGINE_PYTHON}

VOLUME ["/cache", "/var/lib/vllm-bootstrap"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10s --interval=15s --timeout=5s \
    CMD ["/opt/vllm-bootstrap/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["/opt/vllm-bootstrap/bin/python", "/opt/vllm-bootstrap/container_init.py"]
CMD ["vllm-bootstrap", "serve"]
