# The server: docker build -t deformable-detr .
# PyTorch's default wheels include CUDA, so the image runs on the CPU and, with --gpus all, on NVIDIA GPUs. An image
# without CUDA is much smaller: --build-arg TORCH_INDEX=URL, with the index of CPU wheels from PyTorch's install page.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
# The compiler builds the CPU kernels here instead of at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DEFORMABLE_DETR_NATIVE=require
ARG TORCH_INDEX=
RUN pip install torch torchvision ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} && pip freeze | grep -E '^torch(vision)?==' > /opt/torch.txt
WORKDIR /src
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY src src
# Keeps the PyTorch build chosen above. EXTRAS=serve,export also serves exported files.
ARG EXTRAS=serve
RUN pip install ".[${EXTRAS}]" --constraint constraints.txt --constraint /opt/torch.txt

FROM python:${PYTHON}-slim
# The kernels need libgomp at run time.
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
# Mount the model at /model and set DEFORMABLE_DETR_TOKEN: other machines can reach a container.
ENTRYPOINT ["deformable-detr", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
