# NVIDIA's PyTorch image brings CUDA, torch, Apex and Transformer Engine: none of these is compiled here, and the image's
# own torch (2.7) satisfies pyproject.toml, so pip leaves it in place.
FROM nvcr.io/nvidia/pytorch:25.03-py3

WORKDIR /opt/megatron-rs-aligner
COPY . .
RUN pip install --no-cache-dir -e '.[dev]'

CMD ["python", "-m", "pytest", "-ra", "tests/gpu"]
