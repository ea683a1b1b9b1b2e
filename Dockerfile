# NVIDIA's PyTorch image brings CUDA, torch, Apex and Transformer Engine: nothing is compiled here, and the image's own
# torch satisfies pyproject.toml, so pip leaves it in place.
FROM nvcr.io/nvidia/pytorch:24.07-py3

WORKDIR /opt/megatron-rs-aligner
COPY . .
RUN pip install --no-cache-dir -e '.[dev]'

CMD ["python", "-m", "pytest", "-ra", "tests/gpu"]
