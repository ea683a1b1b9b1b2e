"""Convert a Llama-family Hugging Face model (a folder or a GGUF file) to a `.nemo` archive with its tokenizer inside.

python examples/nlp/gpt/convert_hf_to_nemo.py --input path/to/folder_or_file.gguf --output model.nemo

A LlamaForSequenceClassification folder becomes a reward model for serve_reward_model.py.
"""

import argparse
import sys

from nemo_aligner.convert.hf_to_nemo import PRECISIONS, convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="model folder (save_pretrained) or .gguf file")
    parser.add_argument("--output", required=True, help="archive to write, ending in .nemo")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="32", help="dtype of the stored weights")
    parser.add_argument("--dist-ckpt-format", choices=["torch_dist", "zarr"], default="torch_dist")
    arguments = parser.parse_args()
    try:
        convert(arguments.input, arguments.output, arguments.precision, arguments.dist_ckpt_format)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
