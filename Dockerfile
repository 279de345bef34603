# One image for every process: `docker run -p 8080:8080 -v ledger:/data token-ledger` runs all of them on one machine,
# compose.yaml runs them on a JetStream cluster.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/token-ledger
# What is installed is what the lock names, hash by hash; it changes more seldom than the code and is kept apart.
COPY requirements.lock ./
RUN /opt/token-ledger/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY events events
COPY projections projections
COPY service service
RUN /opt/token-ledger/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps . \
    && /opt/token-ledger/bin/python -m compileall -q /opt/token-ledger/lib \
    && /opt/token-ledger/bin/pip uninstall --yes setuptools pip

FROM python:3.11-slim-bookworm
RUN python -m pip uninstall --yes --root-user-action=ignore wheel setuptools pip \
    && groupadd --gid 10001 ledger \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin ledger \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/token-ledger /opt/token-ledger
ENV PATH=/opt/token-ledger/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOKEN_LEDGER_HOST=0.0.0.0 \
    TOKEN_LEDGER_DATA_DIR=/data
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health/ready', timeout=4)"]
ENTRYPOINT ["token-ledger"]
CMD ["up"]
