# The server: docker build -t deformable-detr .
# PyTorch's ordinary wheels bring CUDA along, so the same image computes on the processor and, run with --gpus all, on
# NVIDIA's cards. One without CUDA is much smaller: --build-arg TORCH_INDEX=URL, with the index of CPU wheels (or of
# another CUDA) that PyTorch's page on installing names.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
# A compiler for the CPU kernels; with it they are made here, not at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DEFORMABLE_DETR_NATIVE=require
ARG TORCH_INDEX=
RUN pip install torch torchvision ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} && pip freeze | grep -E '^torch(vision)?==' > /opt/torch.txt
WORKDIR /src
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY src src
# The build of PyTorch that was chosen above stays, or this fails. EXTRAS=serve,export: for exported files too.
ARG EXTRAS=serve
RUN pip install ".[${EXTRAS}]" --constraint constraints.txt --constraint /opt/torch.txt

FROM python:${PYTHON}-slim
# g++ brought libgomp to the build; the kernels need it when they run.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin detr
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
# The model is mounted at /model; DEFORMABLE_DETR_TOKEN has to be set, for others can reach a container's address.
ENTRYPOINT ["deformable-detr", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
