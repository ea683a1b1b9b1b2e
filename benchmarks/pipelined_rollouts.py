"""Rollouts over pipeline stages: the engine and NeMo's generation over all stages, and the engine on one device.

    python -m benchmarks.pipelined_rollouts             # two GPUs: the 1.27-billion-parameter GPT of gpt_1b.py in bf16
    python -m benchmarks.pipelined_rollouts --cpu       # SmolLM2-135M in float32, reduced: checks the script itself

Every row has its own prompt and generates exactly `--new-tokens` tokens. Each stage holds part of the layers, and all
stages work at once on different rows. A stage reads its weights once per turn, whatever the number of rows, so with few
rows additional stages add memory but no speed.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import torch

from benchmarks.gpt_1b import build_actor, build_smollm2
from benchmarks.report import hardware, measured_by, say
from benchmarks.rollouts import inference, measure, prompt_batch, run_engine
from nemo_aligner.compat import cpu
from tests.tiny import save_tokenizer


def measure_backend(args, folder: Path, backend: str, row_counts: list[int]) -> dict[str, dict]:
    """Measure one backend. Runs in every process of a launch; each process is a stage."""
    overrides = {
        "pipeline_model_parallel_size": int(os.environ.get("WORLD_SIZE", "1")),
        "rs.generation": {"backend": backend, "max_rows_in_flight": max(row_counts)},
        "rs.length_params": {"max_length": args.new_tokens, "min_length": args.new_tokens},
        "rs.offload_adam_states": False,
    }
    if args.cpu:
        actor, _ = build_smollm2(**overrides)
    else:
        actor, _ = build_actor(save_tokenizer(folder), optimizer="adamw", **overrides)
    found = {}
    for num_rows in row_counts:
        sizes = argparse.Namespace(**vars(args), prompts=num_rows, rollouts=1)
        batch = prompt_batch(sizes, actor.tokenizer.eos_id, num_ids=actor.tokenizer.vocab_size)
        with inference(actor):
            result = found[f"{backend}, {num_rows} rows"] = measure(partial(run_engine, actor, batch), args.repeats)
        say(
            f"{os.environ.get('WORLD_SIZE', '1'):>7}   {backend:8}{num_rows:>6}{result['tokens_per_s']:>12,.0f}"
            f"{result['spread']:>9.1%}{result['first_s']:>10.1f}{result['peak_gib']:>11.1f}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="*", help="in flight: 64 and 256, on a CPU 8")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the longest prompt, the shortest has half")
    parser.add_argument("--new-tokens", type=int, help="256, on a CPU 16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the results, as JSON")
    parser.add_argument("--backend", choices=("engine", "nemo"), help="measure it alone, over the stages as launched")
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or (16 if args.cpu else 256)
    rows = args.rows or ([8] if args.cpu else [64, 256])
    if args.cpu:
        cpu.enable()
    elif args.backend:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if args.backend:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_backend(args, Path(folder), args.backend, rows)
        if args.save and int(os.environ.get("RANK", "0")) == 0:
            args.save.write_text(json.dumps(found))
        return
    results = {"machine": hardware(), "runs": {}}
    say(json.dumps(results["machine"]))
    say(f"{'stages':>7}   {'backend':8}{'rows':>6}{'tokens/s':>12}{'spread':>9}{'first, s':>10}{'peak, GiB':>11}")
    for num_stages, backend, row_counts in ((1, "engine", rows), (args.stages, "engine", rows),
                                            (args.stages, "nemo", rows[:1])):  # fmt: skip
        arguments = (*sys.argv[1:], "--backend", backend, "--rows", *map(str, row_counts))
        found = measured_by(num_stages, "benchmarks.pipelined_rollouts", *arguments)
        results["runs"][f"{num_stages} stages, {backend}"] = found
    if args.save:
        args.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
