"""One training pass over 64 rollouts: the packed path against the plain one and against the machine's matmul rate.

    python -m benchmarks.train_step                  # one GPU: the 1.27-billion-parameter GPT of gpt_1b.py in bf16
    python -m benchmarks.train_step --devices 2      # rollouts per second of two replicas, compared with one alone
    python -m benchmarks.train_step --cpu            # SmolLM2-135M in float32, reduced: checks the script itself

"packed"    this library: `model.rs.training.packing`, with gradients accumulated in place
"streamed"  "packed" with `model.rs.training.stream_adam_states`: optimizer state on the host except during its step
"plain"     what this library replaces: rows padded to the longest, megatron-core's unfused attention,
            log-probabilities of the full logits, gradients copied

Prompts have 64 to 128 tokens. Responses have 256 tokens, or lengths drawn uniformly from 1 to 256.

A pass is forward and backward over all rollouts. A step is a pass plus gradient reduction, clipping and the optimizer.

FLOPs are those of the model over the tokens that the loss depends on, counted as in PaLM, appendix B
(https://arxiv.org/abs/2204.02311): 6 per matrix parameter and token, plus attention. Attention counts only causal
pairs, and the output layer only positions that predict a response token. Recomputation and padding do not count.

Peak memory is the maximum that torch's allocator had in use during the measured steps, including weights, gradients and
the optimizer's state.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import torch
from megatron.core import parallel_state

from benchmarks.gpt_1b import SMOLLM2, build_actor, build_smollm2, gpt_model, unfused_attention
from benchmarks.report import compare_replicas, hardware, say, say_verdicts
from nemo_aligner.algorithms.balancing import balance_over_replicas
from nemo_aligner.compat import cpu, device
from nemo_aligner.utils.masks import trained_lengths
from nemo_aligner.utils.optimizer_offload import state_tensors
from nemo_aligner.utils.train_utils import clip_gradients
from tests.tiny import save_tokenizer

LARGE_VOCABULARY = 128_256
TERA = 1e12
GIB = 2**30


# ---- the work


def rollouts(args, lengths: str, vocabulary: int, replica: int) -> dict[str, torch.Tensor]:
    """`--rows` padded rollouts of random tokens; `lengths` is "full" or "uniform"."""
    generator = torch.Generator().manual_seed(replica)
    prompts = torch.randint(args.prompt_tokens // 2, args.prompt_tokens + 1, (args.rows,), generator=generator)
    drawn = torch.randint(1, args.new_tokens + 1, (args.rows,), generator=generator)
    ends = prompts + (drawn if lengths == "uniform" else args.new_tokens)
    width = args.prompt_tokens + args.new_tokens
    positions = torch.arange(width)
    tokens = torch.randint(3, vocabulary, (args.rows, width), generator=generator)
    tokens[positions >= ends[:, None]] = 0
    predicted = positions[1:]
    mask = (predicted >= prompts[:, None]) & (predicted < ends[:, None])
    longest = int(ends.max())
    return {"response_tokens": tokens[:, :longest], "mask": mask[:, : longest - 1].float()}


def model_flops(actor, batch: dict[str, torch.Tensor]) -> float:
    """FLOPs of the model's forward and backward over this replica's real tokens; see the module's docstring."""
    model = gpt_model(actor)
    config, layers = model.config, model.decoder.layers
    in_layers = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    in_output = model.shared_embedding_or_output_weight().numel()
    lengths = trained_lengths(batch["mask"]).double()
    causal_pairs = (lengths * (lengths + 1) / 2).sum().item()
    channels = config.num_attention_heads * config.kv_channels
    attention = 3 * 2 * 2 * channels * config.num_layers * causal_pairs
    return 6 * in_layers * lengths.sum().item() + 6 * in_output * batch["mask"].sum().item() + attention


def matmul_rate(size: int) -> float:
    """FLOP/s of a square matrix product, in bf16 on a GPU and float32 on a CPU; the median of several batches."""
    dtype = torch.float32 if device.on_cpu() else torch.bfloat16
    a, b = (torch.randn(size, size, dtype=dtype, device=device.current_device()) for _ in range(2))
    out, rates = torch.empty_like(a), []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize()
        rates.append(10 * 2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates[1:])


# ---- measuring


def build(args, folder: Path, kind: str, **overrides) -> tuple:
    """The actor with its optimizer, ready for a training step; kinds: "packed", "streamed" and "plain"."""
    num_replicas = int(os.environ.get("WORLD_SIZE", "1"))
    overrides = {
        "micro_batch_size": args.micro_batch,
        "global_batch_size": args.rows * num_replicas,
        "rs.num_rollout_samples": args.rows * num_replicas,
        "rs.offload_adam_states": kind == "streamed",
        "rs.training.packing": kind != "plain",
        "rs.training.stream_adam_states": kind == "streamed",
        "gradient_accumulation_fusion": kind != "plain" and args.fusion,
        "masked_softmax_fusion": False,  # would need Apex kernels that few have built, in unfused attention only
        **overrides,
    }
    with unfused_attention() if kind == "plain" else contextlib.nullcontext():
        if args.cpu:
            actor, optimizer = build_smollm2(**overrides)
        else:
            actor, optimizer = build_actor(save_tokenizer(folder), optimizer=args.optimizer, **overrides)
    actor.prepare_for_training()
    return actor, optimizer


def measure(actor, optimizer, batch: dict[str, torch.Tensor], repeats: int, memory_before: int) -> dict:
    """Median seconds of passes and of whole steps after a warm-up step, and peak memory above `memory_before`."""
    passes, steps, loss = [], [], 0.0
    for number in range(repeats + 1):
        if number == 1 and not device.on_cpu():
            torch.cuda.reset_peak_memory_stats()  # exclude the first step: before it, a streamed state is on the GPU
        optimizer.zero_grad()
        actor.prepare_for_training_step()
        torch.cuda.synchronize()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        start = time.perf_counter()
        loss, _ = actor.get_loss_and_metrics(batch, forward_only=False)
        torch.cuda.synchronize()
        passes.append(time.perf_counter() - start)
        actor.finish_training_step()
        clip_gradients(actor, 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    actor.finish_training()
    optimizer.zero_grad()
    # active, not allocated, to include memory that copies still read from
    peak = 0 if device.on_cpu() else torch.cuda.memory_stats()["active_bytes.all.peak"] - memory_before
    return {
        "pass_s": statistics.median(passes[1:]), "passes_s": passes, "step_s": statistics.median(steps[1:]),
        "steps_s": steps,
        "loss": loss, "tokens": int(trained_lengths(batch["mask"]).sum()),
        "share_of_padded": trained_lengths(batch["mask"]).sum().item() / batch["response_tokens"].numel(),
        "peak_gib": peak / GIB,
    }  # fmt: skip


def allocated() -> int:
    """Bytes allocated on the GPU after garbage collection. Resets the peak statistics."""
    gc.collect()
    if device.on_cpu():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def release(actor) -> None:
    """Free the memory of a model and its optimizer, even though autograd hooks keep the objects alive."""
    tensors = list(actor.parameters())
    gradients = [getattr(p, name, None) for p in tensors for name in ("grad", "main_grad")]
    tensors += [gradient for gradient in gradients if gradient is not None]
    if actor.with_distributed_adam:
        tensors += state_tensors(actor)
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)


def measure_kind(args, folder: Path, kind: str, cases: tuple[str, ...], rate: float, **overrides) -> dict[str, dict]:
    """Build one kind of model, measure each case, print a line for it, and free the model."""
    memory_before = allocated()
    start = time.perf_counter()
    actor, optimizer = build(args, folder, kind, **overrides)
    say(f"{kind}: built in {time.perf_counter() - start:.1f} s; {memory_before / GIB:.1f} GiB left over from before")
    found = {}
    try:
        for case in cases:
            vocabulary = gpt_model(actor).shared_embedding_or_output_weight().size(0)
            batch = rollouts(args, case, vocabulary, parallel_state.get_data_parallel_rank())
            if parallel_state.get_data_parallel_world_size() > 1:
                batch = balance_over_replicas(with_common_width(batch), args.rows, pad_value=0)
            result = measure(actor, optimizer, batch, args.repeats, memory_before)
            result["share_of_matmul"] = model_flops(actor, batch) / result["pass_s"] / rate
            found[case] = result
            say(
                f"{kind:12}{case:10}{result['pass_s']:>9.3f}{result['step_s']:>9.3f}"
                f"{result['tokens'] / result['pass_s']:>11,.0f}"
                f"{result['share_of_matmul']:>10.1%}{result['peak_gib']:>10.1f}{result['share_of_padded']:>10.1%}"
                f"{result['loss']:>10.4f}   {' '.join(f'{s:.3f}' for s in result['passes_s'])}"
            )
    finally:
        release(actor)
    return found


def with_common_width(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad the batch to the same width on all replicas, as the trainer does."""
    width = torch.tensor(batch["response_tokens"].size(1), device=device.current_device())
    torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
    missing = width.item() - batch["response_tokens"].size(1)
    return {key: torch.nn.functional.pad(value, (0, missing)) for key, value in batch.items()}


def attempt(name: str, function, *args, **kwargs) -> dict:
    """The function's result, or {} if it fails, so that one failure does not end the whole run."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        traceback.print_exc()
        say(f"{name}: FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return {}


# ---- results


def verdicts(found: dict) -> list[tuple[str, float, str, bool]]:
    """(name, value, target, whether it is met) for each measurement."""
    lines = []
    packed, plain = found.get("packed", {}), found.get("plain", {})
    if "full" in packed:
        lines.append(("seconds a pass, full", packed["full"]["pass_s"], "<= 0.45", packed["full"]["pass_s"] <= 0.45))
    for case in packed:
        share = packed[case]["share_of_matmul"]
        lines.append((f"share of the matmul rate, {case}", share, ">= 0.55", share >= 0.55))
        if case in plain:
            ratio = plain[case]["pass_s"] / packed[case]["pass_s"]
            lines.append((f"times faster than plain, {case}", ratio, ">= 2.3", ratio >= 2.3))
            difference = abs(packed[case]["loss"] / plain[case]["loss"] - 1)
            lines.append((f"loss differs from plain's, {case}", difference, "<= 0.002", difference <= 0.002))
            for kind in ("packed", "streamed") if plain[case]["peak_gib"] else ():
                if case in found.get(kind, {}):
                    memory = found[kind][case]["peak_gib"] / plain[case]["peak_gib"]
                    lines.append((f"peak memory, {kind} / plain, {case}", memory, "<= 0.6", memory <= 0.6))
    return lines


def measured_steps(results: dict) -> dict[str, list[float]]:
    """Seconds of the packed path's steps, without the first one."""
    return {case: measured["steps_s"][1:] for case, measured in results["kinds"]["packed"].items()}


def add_common_arguments(parser: argparse.ArgumentParser, new_tokens: str) -> None:
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--optimizer", default="distributed_fused_adam", help="on a CPU always adamw")
    parser.add_argument("--no-fusion", dest="fusion", action="store_false", help="gradients not accumulated in place")
    parser.add_argument("--micro-batch", type=int, help="rows: 8, on a CPU 2")
    parser.add_argument("--prompt-tokens", type=int, help="of the longest prompt, the shortest has half: 128 or 16")
    parser.add_argument("--new-tokens", type=int, help=new_tokens)
    parser.add_argument("--devices", type=int, default=1, help="replicas to compare with one; 0: as launched")
    parser.add_argument("--save", type=Path, help="file for the results, as JSON")


def parse_and_fill_in(parser: argparse.ArgumentParser, **sizes: tuple[int, int]) -> argparse.Namespace:
    """Parse the arguments and fill in the defaults for sizes, given as (on a GPU, on a CPU)."""
    args = parser.parse_args()
    sizes |= {"micro_batch": (8, 2), "prompt_tokens": (128, 16), "new_tokens": (256, 16)}
    for key, (on_gpu, on_cpu) in sizes.items():
        if getattr(args, key) is None:
            setattr(args, key, on_cpu if args.cpu else on_gpu)
    args.fusion &= not args.cpu and "distributed" in args.optimizer
    args.streams = not args.cpu and args.optimizer == "distributed_fused_adam"
    if args.cpu and not SMOLLM2.exists():
        parser.error(f"{SMOLLM2} does not exist: `make model` fetches and converts it")
    num_gpus, needed = torch.cuda.device_count(), max(args.devices, 1)
    if not args.cpu and num_gpus < needed:
        parser.error(f"{num_gpus} GPU(s) found; --cpu runs the script without one")
    return args


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, new_tokens="256, on a CPU 16")
    parser.add_argument("--rows", type=int, help="rollouts of each replica: 64, on a CPU 8")
    parser.add_argument("--repeats", type=int, default=5, help="measured passes after one of warm-up")
    parser.add_argument(
        "--only", nargs="*", choices=("packed", "streamed", "plain", "vocabulary"), help="what to measure"
    )
    return parse_and_fill_in(parser, rows=(64, 8))


def main() -> None:
    args = parsed_arguments()
    if args.cpu:
        cpu.enable()
    if args.devices > 1:
        compare_replicas(args.devices, "benchmarks.train_step", measured_steps, args.rows, args.save)
        return
    if not args.cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    results = {"machine": hardware(), "matmul_tflops": matmul_rate(1024 if args.cpu else 8192) / TERA, "kinds": {}}
    rate = results["matmul_tflops"] * TERA
    say(json.dumps(results["machine"]))
    say(f"matmul {results['matmul_tflops']:.3g} TFLOP/s; {args.rows} rollouts a replica, {args.micro_batch} at a time")
    say(
        f"{'':12}{'responses':10}{'pass, s':>9}{'step, s':>9}{'tokens/s':>11}{'of matmul':>10}{'peak GiB':>10}"
        f"{'of padded':>10}{'loss':>10}   passes, s"
    )
    wanted = args.only or (["packed", "streamed", "plain", "vocabulary"] if args.devices == 1 else ["packed"])
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("packed", "streamed", "plain"):
            if kind in wanted and (kind != "streamed" or args.streams):
                cases = ("full", "uniform")
                results["kinds"][kind] = attempt(kind, measure_kind, args, Path(folder), kind, cases, rate)
        if args.devices == 1:
            say_verdicts(verdicts(results["kinds"]))
        if "vocabulary" in wanted and not args.cpu:
            overrides = {"override_vocab_size": LARGE_VOCABULARY}
            found = attempt("vocabulary", measure_kind, args, Path(folder), "packed", ("full",), rate, **overrides)
            results["kinds"]["packed, vocabulary of 128,256"] = found
            say(f"{'a vocabulary of 128,256':40}{'fits' if found else 'fails':>19}   {'PASS' if found else 'MISS'}")
    if args.save and int(os.environ.get("RANK", "0")) == 0:
        args.save.write_text(json.dumps(results, indent=2) + "\n")
    if not all(results["kinds"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
