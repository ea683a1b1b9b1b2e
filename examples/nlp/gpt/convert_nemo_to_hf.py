"""Convert a Llama-family `.nemo` archive, trained or not, to a Hugging Face folder with its tokenizer.

python examples/nlp/gpt/convert_nemo_to_hf.py --input model.nemo --output path/to/folder
python examples/nlp/gpt/convert_nemo_to_hf.py --input base.nemo --lora adapters.nemo --output path/to/folder
"""

import argparse
import sys

import nemo_aligner.compat.quiet_imports  # noqa: F401  must come first: it silences the imports below

# isort: split
from nemo_aligner.convert.nemo_to_hf import PRECISIONS, export
from nemo_aligner.utils.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help=".nemo archive, or the folder it was extracted to")
    parser.add_argument("--lora", help=".nemo archive of LoRA adapters, to be merged into the model")
    parser.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="32", help="dtype of the written weights")
    arguments = parser.parse_args()
    try:
        export(arguments.input, arguments.output, arguments.precision, arguments.lora)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
