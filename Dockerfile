# The daemon in a container, on top of an image that already has vLLM.
#
#   scripts/build_image.sh          # the same as `docker build -t vllm-bootstrap:latest .`, with the build facts
#   docker run --gpus all --shm-size 16g -p 127.0.0.1:8000:8000 -v llm-cache:/cache -v llm-state:/var/lib/vllm-bootstrap \
#     -e VLLM_ACCESS_KEY="$KEY" vllm-bootstrap
#
# The base needs Python 3.11 or newer with pip; venv is not needed. The daemon lives in an environment of its own, so that
# neither can break the other's dependencies. What the arguments and folders are for: docs/containers.md.

ARG VLLM_BASE_IMAGE=vllm/vllm-openai:v0.32.0

# hadolint ignore=DL3006
FROM ${VLLM_BASE_IMAGE} AS build
COPY scripts/make_venv.sh requirements-build.lock /src/
RUN sh /src/make_venv.sh /build \
    && /build/bin/python -m pip install --no-cache-dir --require-hashes -r /src/requirements-build.lock
COPY pyproject.toml README.md LICENSE CHANGELOG.md /src/
COPY templates /src/templates
COPY vllm_bootstrap /src/vllm_bootstrap
RUN /build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels /src
# The data plane as machine code: a request costs little more than half; where the base has no C compiler or no headers of
# Python the image works without. `/version` tells which it is.
COPY requirements.lock scripts/compile_modules.py scripts/code_map.py /src/scripts/
RUN /build/bin/python -m pip install --no-cache-dir --require-hashes -r /src/scripts/requirements.lock \
    && /build/bin/python /src/scripts/compile_modules.py --optional \
    && mkdir -p /src/vllm_bootstrap/_compiled

# hadolint ignore=DL3006
FROM ${VLLM_BASE_IMAGE}
# The init gives root up for the daemon; it needs it for volumes and sshd.
# hadolint ignore=DL3002
USER 0

# sshd, and vmtouch, which warms the page cache more exactly than the daemon's own way. Both may be missing: a base
# without apt, or one that does not have vmtouch. Host keys that the package made would be the same in every container.
ARG WITH_SSHD=true
# hadolint ignore=DL3008
RUN set -eu; \
    if command -v apt-get >/dev/null; then \
        export DEBIAN_FRONTEND=noninteractive; \
        apt-get update; \
        apt-get install -y --no-install-recommends vmtouch || echo "vmtouch is not to be had here: going on without" >&2; \
        if [ "$WITH_SSHD" = true ]; then apt-get install -y --no-install-recommends openssh-server; fi; \
        rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*; \
    fi

# The interpreter that has vLLM. Without vLLM (NEEDS_VLLM=false) the image runs the simulator and other engines.
ARG ENGINE_PYTHON=/usr/bin/python3
ARG NEEDS_VLLM=true
RUN if [ "$NEEDS_VLLM" = true ] && ! "$ENGINE_PYTHON" -c 'import importlib.metadata as m; m.version("vllm")'; then \
        echo "$ENGINE_PYTHON of this base image has no vLLM: name another by --build-arg ENGINE_PYTHON=, or" \
             "build with --build-arg NEEDS_VLLM=false" >&2; \
        exit 1; \
    fi

COPY scripts/make_venv.sh requirements.lock /opt/vllm-bootstrap-build/
RUN sh /opt/vllm-bootstrap-build/make_venv.sh /opt/vllm-bootstrap \
    && /opt/vllm-bootstrap/bin/python -m pip install --no-cache-dir --require-hashes \
        -r /opt/vllm-bootstrap-build/requirements.lock \
    && rm -r /opt/vllm-bootstrap-build
COPY --from=build /wheels /tmp/wheels
COPY --from=build /src/vllm_bootstrap/_compiled /tmp/_compiled
RUN /opt/vllm-bootstrap/bin/python -m pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && mv /tmp/_compiled "$(/opt/vllm-bootstrap/bin/python -c 'import vllm_bootstrap as v; print(v.__path__[0])')" \
    && rm -r /tmp/wheels \
    && ln -s /opt/vllm-bootstrap/bin/vllm-bootstrap /usr/local/bin/vllm-bootstrap
COPY scripts/container_init.py scripts/container_setup.py /opt/vllm-bootstrap/

# The daemon and its engines run as this user; the init starts as root, gives the volumes' top folders away and drops
# its rights for the daemon. Some bases have a user of this number: both names are fine.
ARG DAEMON_UID=1000
RUN useradd --non-unique --uid "$DAEMON_UID" --user-group --create-home --shell /bin/bash vllm-bootstrap \
    && install -d -m 0755 -o vllm-bootstrap -g vllm-bootstrap /cache \
    && install -d -m 0700 -o vllm-bootstrap -g vllm-bootstrap /var/lib/vllm-bootstrap /run/vllm-bootstrap \
    && install -d -m 0755 /models /app-config \
    && install -d -m 1777 /run/lock/vllm-bootstrap

ARG BUILD_SHA=dev
ARG BUILD_TIME=dev
# HOST: a container's loopback cannot be reached from outside. Without a key configured the daemon makes one at its first
# start and says in which file it is; `docker exec CONTAINER vllm-bootstrap keys show` prints it.
ENV HOST=0.0.0.0 \
    PORT=8000 \
    DAEMON_USER=vllm-bootstrap \
    HF_HOME=/cache \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_BOOTSTRAP_STATE_DIR=/var/lib/vllm-bootstrap \
    VLLM_BOOTSTRAP_RUNTIME_DIR=/run/vllm-bootstrap \
    VLLM_BOOTSTRAP_LOCK_DIR=/run/lock/vllm-bootstrap \
    VLLM_BOOTSTRAP_ENGINE_PYTHON=${ENGINE_PYTHON} \
    BUILD_SHA=${BUILD_SHA} \
    BUILD_TIME=${BUILD_TIME}
LABEL org.opencontainers.image.title="vllm-bootstrap" \
      org.opencontainers.image.description="Launches vLLM engines and carries realtime and batch traffic to them" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${BUILD_SHA}" \
      org.opencontainers.image.created="${BUILD_TIME}"

WORKDIR /var/lib/vllm-bootstrap
VOLUME ["/cache", "/var/lib/vllm-bootstrap"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a model may load for longer than anybody wants to wait before restarting. With TLS give a check of your own.
HEALTHCHECK --start-period=20s --interval=15s --timeout=5s --retries=4 \
    CMD ["/opt/vllm-bootstrap/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["/opt/vllm-bootstrap/bin/python", "/opt/vllm-bootstrap/container_init.py"]
CMD ["vllm-bootstrap", "serve"]
