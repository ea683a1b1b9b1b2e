"""A whole RS step, 16 prompts x 4 rollouts, by phases: this library, and NeMo's generate with plain training.

    python -m benchmarks.rs_step                # one GPU: the 1.27-billion-parameter GPT of gpt_1b.py in bf16
    python -m benchmarks.rs_step --devices 2    # rollouts per second of two replicas, compared with one alone
    python -m benchmarks.rs_step --cpu          # SmolLM2-135M in float32, reduced: checks the script itself

A step generates responses of up to 256 tokens to prompts of 64 to 128 tokens, scores them with a Python function,
selects the best response to each prompt, trains on these 16, and steps the optimizer. `RSTrainer` itself runs it.

"ours" generates with the engine and trains on packed rows. "NeMo" uses `rs.generation.backend=nemo` and the plain path
of train_step.py. Weights, prompts and random numbers are the same. About one token in 107 ends a response, so lengths
are geometrically distributed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import torch
from omegaconf import OmegaConf

from benchmarks.report import compare_replicas, hardware, say, say_verdicts
from benchmarks.train_step import (
    add_common_arguments,
    allocated,
    attempt,
    build,
    parse_and_fill_in,
    release,
)
from nemo_aligner.algorithms.rs import RSTrainer
from nemo_aligner.compat import cpu
from nemo_aligner.data.nlp.builders import build_dataloader, collate_with_pad_to_max_batch
from nemo_aligner.rewards.python_reward import PythonRewardModel, load_reward_function
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.phases import TOTAL, phase_table
from nemo_aligner.utils.train_script_utils import FakeCheckpointCallback, FakeScheduler

NUM_ROLLOUTS = 4
NUM_IDS = 320  # token ids of the tokenizer
TARGET = 10
REWARD = f"{__file__}:closeness_to_100_characters"


def closeness_to_100_characters(prompts, responses):
    """A reward that costs no time but has a preference."""
    return [-abs(len(response) - 100.0) for response in responses]


class RandomPrompts(torch.utils.data.Dataset):
    """Prompts of random tokens, of `longest` / 2 to `longest` tokens."""

    def __init__(self, count: int, longest: int):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
        self.prompts = [torch.randint(3, NUM_IDS, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        prompt = self.prompts[index]
        return {
            "text": prompt, "length": len(prompt), "loss_multiplier": True, "prompt_index": index, "is_padding": False,
        }  # fmt: skip


class Log:
    """Replaces the trainer's logger; keeps the metrics by prefix."""

    def __init__(self):
        self.metrics: dict[str, list[dict]] = {}

    def log_metrics(self, metrics: dict, step: int | None = None, prefix: str = "") -> None:
        self.metrics.setdefault(prefix, []).append(dict(metrics))

    def log_table(self, key, dataframe, step) -> None:
        """Tables are not kept."""

    def finalize(self) -> None:
        """Nothing to do."""


def run(args, folder: Path, kind: str, num_steps: int) -> dict:
    """The phases of the median of `num_steps` steps, after one warm-up step."""
    memory_before = allocated()
    # GPU: with the tokenizer's own end, three tokens of 320. CPU: tokens that SmolLM2 has learned to use.
    ends = [",", ".", " ", "\n", " and", " of", " the"] if args.cpu else ["A", "B"]
    overrides = {
        "rs.rollout_micro_batch_size": args.prompts,
        "rs.num_rollouts_per_prompt": NUM_ROLLOUTS,
        "rs.offload_adam_states": True,
        "rs.generation": {"backend": "engine" if kind == "packed" else "nemo", "max_rows_in_flight": 256},
        "rs.length_params": {"max_length": args.new_tokens, "min_length": 1},
        "rs.sampling_params.end_strings": ends,
    }
    actor, optimizer = build(args, folder, kind, **overrides)
    num_prompts = args.prompts * int(os.environ.get("WORLD_SIZE", "1"))
    cfg = OmegaConf.create(
        {
            "trainer": {"rs": {
                "max_epochs": 1, "max_steps": num_steps + 1, "val_check_interval": 0, "save_interval": 0,
                "gradient_clip_val": 1.0, "model_gbs": num_prompts, "model_mbs": args.micro_batch,
                "rollout_batch_seq_length": None,
            }},
            "model": {"seed": 1234, "data": {"num_workers": 0}},
        }
    )  # fmt: skip
    prompts = RandomPrompts(num_prompts * (max(args.steps, args.nemo_steps) + 1), args.prompt_tokens)
    loading = {
        "cfg": cfg, "dataset": prompts, "consumed_samples": 0, "mbs": args.prompts, "gbs": num_prompts,
        "collate_fn": collate_with_pad_to_max_batch(args.new_tokens, actor.tokenizer.eos_id, cfg), "load_gbs": False,
    }  # fmt: skip
    log = Log()
    rm = PythonRewardModel(load_reward_function(REWARD), actor.tokenizer, ends)
    trainer = RSTrainer(
        cfg=cfg.trainer.rs,
        model=actor,
        optimizer=optimizer,
        scheduler=FakeScheduler(),
        train_dataloader=build_dataloader(**loading),
        val_dataloader=build_dataloader(**loading, use_random_sampler=False),
        logger=log,
        ckpt_callback=FakeCheckpointCallback(),
        run_timer=Timer(None),
        num_rollouts_per_prompt=NUM_ROLLOUTS,
        top_n_rollouts=1,
        rm=rm,
    )
    trainer.fit()
    rm.close()
    first, *steps = log.metrics["timers/phase_"]
    median = sorted(steps, key=lambda phases: phases[TOTAL])[len(steps) // 2]
    if not all(metrics["loss"] > 0 for metrics in log.metrics["train_optim/"]):
        raise RuntimeError("no chosen response ended by itself, so that a step trained on nothing: choose other ends")
    lengths = [metrics["global_response_lengths_mean"] for metrics in log.metrics["train_rollouts/"]]
    peak = 0.0 if args.cpu else (torch.cuda.max_memory_allocated() - memory_before) / 2**30
    say(
        f"{kind:10} steps of {' '.join(f'{phases[TOTAL]:.3f}' for phases in steps)} s, the first {first[TOTAL]:.3f} s; "
        f"mean response {statistics.mean(lengths[1:]):.1f} tokens; peak {peak:.1f} GiB"
    )
    release(actor)
    return {"phases": median, "steps_s": [phases[TOTAL] for phases in steps], "mean_response": lengths}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, new_tokens="at most: 256, on a CPU 16")
    parser.add_argument("--prompts", type=int, help="of a step: 16, on a CPU 4")
    # with more steps, the random weights learn never to end a response
    parser.add_argument("--steps", type=int, choices=range(1, 9), default=5, help="of ours, after one of warm-up")
    parser.add_argument("--nemo-steps", type=int, default=1, help="of NeMo's way, after one of warm-up")
    args = parse_and_fill_in(parser, prompts=(16, 4))
    args.rows = args.prompts  # what a step trains on
    return args


def main() -> None:
    args = parsed_arguments()
    if args.cpu:
        cpu.enable()
    if args.devices > 1:
        compare_replicas(args.devices, "benchmarks.rs_step", measured_steps, args.prompts * NUM_ROLLOUTS, args.save)
        return
    if not args.cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    results = {"machine": hardware()}
    say(json.dumps(results["machine"]))
    with tempfile.TemporaryDirectory() as folder:
        ours = results["ours"] = attempt("ours", run, args, Path(folder), "packed", args.steps)
        if ours:
            say("\n" + phase_table({"ours": ours["phases"]}) + "\n")
        if args.devices == 1:
            nemo = results["NeMo"] = attempt("NeMo", run, args, Path(folder), "plain", args.nemo_steps)
            if ours and nemo:
                say("\n" + phase_table({"ours": ours["phases"], "NeMo": nemo["phases"]}))
                ratio = nemo["phases"][TOTAL] / ours["phases"][TOTAL]
                say_verdicts([("times faster than NeMo's way", ratio, f">= {TARGET}", ratio >= TARGET)])
    if args.save and int(os.environ.get("RANK", "0")) == 0:
        args.save.write_text(json.dumps(results, indent=2) + "\n")
    if not all(results.values()):
        sys.exit(1)


def measured_steps(results: dict) -> dict[str, list[float]]:
    return {"RS steps": results["ours"]["steps_s"]}


if __name__ == "__main__":
    main()
