# NVIDIA's PyTorch image includes CUDA, torch, Apex and Transformer Engine, so none of these is compiled here. Its
# torch (2.7) satisfies pyproject.toml, so pip keeps it.
FROM nvcr.io/nvidia/pytorch:25.03-py3

WORKDIR /opt/megatron-rs-aligner
COPY . .
RUN pip install --no-cache-dir -e '.[dev]'

CMD ["python", "-m", "pytest", "-ra", "tests/gpu"]
