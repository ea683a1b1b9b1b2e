"""Rollout throughput: the engine, NeMo's and transformers' `generate`, on the same machine, model size and prompts.

    python -m benchmarks.rollouts                # on a GPU: a random 1.27-billion-parameter GPT in bf16
    python -m benchmarks.rollouts --cpu          # SmolLM2-135M in float32, models/SmolLM2-135M-Instruct.nemo

"NeMo's generate" uses NeMo and megatron-core unmodified. On a CPU, this library makes their layers multiply through
oneDNN, which is twice as fast (`nemo_aligner.compat.cpu_linear`); there it is also measured that way.

Every row generates exactly `--new-tokens` tokens, except under "geometric", where each token ends its row with
probability 1 / 64. The roofline is the memory-bandwidth limit: each step reads the weights and the filled part of the
cache once, at the bandwidth of a large copy, measured here. `--save` writes the results to a file, as JSON.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import torch
from nemo.collections.nlp.modules.common.text_generation_utils import get_default_sampling_params
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from omegaconf import OmegaConf, open_dict
from pytorch_lightning import Trainer
from torch.nn import functional

from benchmarks.report import hardware, say_verdicts
from nemo_aligner.compat import cpu, cpu_linear, device
from nemo_aligner.generation.engine import Engine

ROOT = Path(__file__).parents[1]
NUM_IDS = 32_000
MEAN_LENGTH = 64

GPU_MODEL = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "num_query_groups": 16,
    "kv_channels": 128, "normalization": "layernorm", "activation": "gelu", "bias": True,
    "position_embedding_type": "rope", "rotary_percentage": 1.0, "share_embeddings_and_output_weights": True,
}  # fmt: skip


# ---- the models


def rs_section(new_tokens: int, max_rows: int, backend: str) -> dict:
    return {
        "length_params": {"max_length": new_tokens, "min_length": new_tokens},
        "sampling_params": {
            "use_greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
            "end_strings": [],
        },
        "offload_adam_states": False,
        "forward_micro_batch_size": 1,
        "generation": {"backend": backend, "max_rows_in_flight": max_rows},
    }  # fmt: skip


def random_actor(args, folder: Path):
    """The GPT of `GPU_MODEL`, with random weights in bf16; needs no archive."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel

    words = {"<|endoftext|>": 0, **{f"w{index}": index for index in range(1, NUM_IDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    cfg = OmegaConf.create(
        {
            **GPU_MODEL, **args.sizes, "mcore_gpt": True, "transformer_engine": True, "megatron_amp_O2": True,
            "precision": "bf16", "micro_batch_size": 1, "global_batch_size": 1, "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None,
            "use_cpu_initialization": device.on_cpu(), "encoder_seq_length": 4096, "max_position_embeddings": 4096,
            "init_method_std": 0.02, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0,
            "layernorm_epsilon": 1e-5, "bias_activation_fusion": False, "bias_dropout_add_fusion": False,
            "make_vocab_size_divisible_by": 128, "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
            "sequence_parallel": False, "seed": 1234, "optim": {"name": "adamw", "lr": 1e-6},
            "tokenizer": {"library": "huggingface", "type": str(folder), "use_fast": True},
            "data": {"seq_length": 4096}, "rs": rs_section(args.new_tokens, args.max_rows, "engine"),
        }
    )  # fmt: skip
    actor = MegatronGPTRSModel(cfg, trainer())
    return actor if device.on_cpu() else actor.cuda()


def smollm2_actor(args):
    from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
    from nemo_aligner.utils.utils import load_checkpoint_model_config, load_from_nemo

    path = str(ROOT / "models/SmolLM2-135M-Instruct.nemo")
    cfg = load_checkpoint_model_config(path)
    with open_dict(cfg):
        cfg.rs = rs_section(args.new_tokens, args.max_rows, "engine")
        cfg.use_cpu_initialization = True
    return load_from_nemo(MegatronGPTRSModel, cfg, trainer(), restore_path=path)


def trainer() -> Trainer:
    return Trainer(
        devices=1, num_nodes=1, accelerator="cpu" if device.on_cpu() else "gpu", strategy=NLPDDPStrategy(),
        logger=False, enable_checkpointing=False,
    )  # fmt: skip


def of_transformers(args):
    """A transformers model of the same size and, on a CPU, with the same weights."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    if args.cpu:
        folder, name = ROOT / "models", "SmolLM2-135M-Instruct.Q4_1.gguf"
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32).eval()
    config = GPTNeoXConfig(
        vocab_size=NUM_IDS, hidden_size=GPU_MODEL["hidden_size"], num_hidden_layers=GPU_MODEL["num_layers"],
        num_attention_heads=GPU_MODEL["num_attention_heads"], intermediate_size=GPU_MODEL["ffn_hidden_size"],
        rotary_pct=1.0, use_parallel_residual=False, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        return GPTNeoXForCausalLM(config).to(torch.bfloat16).eval()


# ---- the work


def prompt_batch(args, eos_id: int, num_ids: int = NUM_IDS) -> dict[str, torch.Tensor]:
    """`--prompts` prompts of various lengths, with token ids below `num_ids`, each in `--rollouts` adjacent rows."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest = (args.prompt_tokens + 1) // 2, args.prompt_tokens
    lengths = torch.randint(shortest, longest + 1, (args.prompts,), generator=generator)
    text = torch.full((args.prompts, longest + args.new_tokens), eos_id)
    for row, length in zip(text, lengths.tolist(), strict=True):
        row[:length] = torch.randint(3, num_ids, (length,), generator=generator)
    return {"text": text.repeat_interleave(args.rollouts, 0), "length": lengths.repeat_interleave(args.rollouts)}


@contextlib.contextmanager
def inference(actor):
    """A rollout phase, in which memory for keys and values is allocated and graphs are captured."""
    actor.prepare_for_inference()
    yield
    actor.finish_inference()


def run_engine(actor, batch) -> int:
    rollouts = actor.infer(batch)
    return int((rollouts["response_lengths"] - rollouts["prompt_lengths"]).sum())


def run_geometric(actor, engine, batch, args) -> int:
    """Call the engine directly, because no tokenizer has 500 end tokens."""
    from nemo_aligner.generation.ends import EndStrings
    from nemo_aligner.generation.rows import Decoding, Row
    from nemo_aligner.generation.sampling import SamplingParams, random_streams

    vocab_size = actor.tokenizer.vocab_size
    ends = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))[: vocab_size // MEAN_LENGTH]
    decoding = Decoding(SamplingParams(), args.new_tokens, 0, tuple(ends.tolist()), vocab_size)
    streams = random_streams((1,), [(row,) for row in range(len(batch["length"]))], args.new_tokens)
    rows = [
        Row(text[:length].tolist(), stream, 0)
        for text, length, stream in zip(batch["text"], batch["length"].tolist(), streams, strict=True)
    ]
    return sum(len(row.generated) for row in engine.generate(rows, decoding, EndStrings([], actor.tokenizer)))


def run_nemo(actor, batch, args) -> int:
    from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy

    tokens, lengths = (batch[key].to(device.current_device()) for key in ("text", "length"))
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, lengths, args.new_tokens, args.new_tokens)
    actor.generate(
        inputs=(tokens.clone(), lengths),
        length_params={"max_length": args.new_tokens, "min_length": args.new_tokens},
        sampling_params={**get_default_sampling_params(), "use_greedy": False, "end_strings": ["<|endoftext|>"]},
        strategy=strategy,
    )
    return len(lengths) * args.new_tokens


def run_transformers(model, batch, args, eos_id: int) -> int:
    lengths = batch["length"]
    width = int(lengths.max())
    tokens = torch.full((len(lengths), width), eos_id)
    mask = torch.zeros_like(tokens)
    for row, (text, length) in enumerate(zip(batch["text"], lengths.tolist(), strict=True)):
        tokens[row, width - length :], mask[row, width - length :] = text[:length], 1
    model.generate(
        tokens.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, pad_token_id=eos_id,
        max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
    )  # fmt: skip
    return len(lengths) * args.new_tokens


# ---- measuring


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, counting both bytes read and bytes written."""
    source = torch.empty(2**28 if device.on_cpu() else 2**31, dtype=torch.uint8, device=device.current_device())
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * source.numel() / statistics.median(seconds)


def roofline(actor, batch, args, in_flight: int, bandwidth: float) -> float:
    """Tokens per second if each step only read the weights and the filled part of the cache once."""
    gpt_model, config = actor.get_model_module_list()[0], actor.get_model_module_list()[0].config
    size = next(gpt_model.parameters()).element_size()
    weights = sum(parameter.numel() for parameter in gpt_model.parameters()) * size
    per_token = 2 * config.num_layers * config.num_query_groups * config.kv_channels * size
    filled = batch["length"].float().mean().item() + args.new_tokens / 2
    return in_flight * bandwidth / (weights + in_flight * filled * per_token)


def verdicts(runs: dict[str, dict], num_rows: int, on_cpu: bool) -> list[tuple[str, float, str, bool]]:
    """(name, value, target, whether it is met) for each measurement."""
    found = []

    def at_least(what: str, value: float, target: float) -> None:
        found.append((what, value, f">= {target:g}", value >= target))

    engine = runs.get(f"engine, {num_rows} in flight")
    if engine is None:
        return found
    speed = engine["tokens_per_s"]
    if "NeMo's generate" in runs:
        at_least("times NeMo's generate", speed / runs["NeMo's generate"]["tokens_per_s"], 4 if on_cpu else 25)
    if on_cpu:
        if "transformers' generate" in runs:
            at_least("times transformers' generate", speed / runs["transformers' generate"]["tokens_per_s"], 1)
        return found
    at_least("tokens/s", speed, 25_000)
    at_least("share of the roofline", engine["share_of_roofline"], 0.7)
    if "engine, 256 in flight" in runs:
        at_least("tokens/s, 256 in flight", runs["engine, 256 in flight"]["tokens_per_s"], 38_000)
    geometric = runs.get(f"engine, geometric, {num_rows} in flight")
    if geometric is not None:
        at_least("geometric lengths / fixed length", geometric["tokens_per_s"] / speed, 0.8)
    found.append(("first call, s", engine["first_s"], "<= 30", engine["first_s"] <= 30))
    if "NeMo's generate" in runs:
        memory = engine["peak_gib"] / runs["NeMo's generate"]["peak_gib"]
        found.append(("peak memory / that of NeMo's generate", memory, "<= 1", memory <= 1))
    return found


def measure(work, repeats: int) -> dict:
    """Seconds of the first call, and tokens per second of the later ones: median and spread."""
    seconds, num_tokens = [], 0
    if not device.on_cpu():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        num_tokens = work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rates = [num_tokens / s for s in seconds[1:] or seconds]
    peak = 0.0 if device.on_cpu() else torch.cuda.max_memory_allocated() / 2**30
    return {
        "tokens": num_tokens, "first_s": seconds[0], "tokens_per_s": statistics.median(rates),
        "spread": (max(rates) - min(rates)) / statistics.median(rates), "peak_gib": peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--prompts", type=int, help="64, on a CPU 8")
    parser.add_argument("--rollouts", type=int, help="of each prompt: 1, on a CPU 4")
    parser.add_argument("--prompt-tokens", type=int, help="of the longest prompt, the shortest has half: 128 or 64")
    parser.add_argument("--new-tokens", type=int, help="256, on a CPU 48")
    parser.add_argument("--max-rows", type=int, default=256, help="rows in flight at most")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of the runs that are wanted, of those in the table")
    parser.add_argument("--sizes", type=json.loads, default={}, help="changes of the GPU's model, as JSON")
    parser.add_argument("--save", type=Path, help="file for the results, as JSON")
    args = parser.parse_args()
    for key, (on_gpu, on_cpu) in {
        "prompts": (64, 8), "rollouts": (1, 4), "prompt_tokens": (128, 64), "new_tokens": (256, 48)
    }.items():  # fmt: skip
        if getattr(args, key) is None:
            setattr(args, key, on_cpu if args.cpu else on_gpu)
    if args.cpu:
        cpu.enable()

    bandwidth = copy_bandwidth()
    folder = contextlib.nullcontext() if args.cpu else tempfile.TemporaryDirectory()
    with folder as name:
        actor = smollm2_actor(args) if args.cpu else random_actor(args, Path(name))
    batch = prompt_batch(args, actor.tokenizer.eos_id)
    num_rows = len(batch["length"])
    many = prompt_batch(argparse.Namespace(**{**vars(args), "prompts": 64, "rollouts": 4}), actor.tokenizer.eos_id)
    streamed = prompt_batch(argparse.Namespace(**{**vars(args), "prompts": 64, "rollouts": 16}), actor.tokenizer.eos_id)

    def whole_phase():
        with inference(actor):
            return run_engine(actor, batch)

    runs = {
        f"engine, {num_rows} in flight": (lambda: run_engine(actor, batch), args.repeats),
        f"engine, {num_rows}, memory and graphs anew": (whole_phase, args.repeats),
    }
    if not args.cpu:
        engine = Engine(actor.get_model_module_list()[0], num_rows)
        runs["engine, 256 in flight"] = (lambda: run_engine(actor, many), args.repeats)
        runs[f"engine, geometric, {num_rows} in flight"] = (
            lambda: run_geometric(actor, engine, streamed, args),
            args.repeats,
        )

    def with_nemo():
        with mock.patch.object(cpu_linear, "linear", functional.linear):
            return run_nemo(actor, batch, args)

    runs["NeMo's generate"] = (with_nemo, 1)
    if args.cpu:
        runs["NeMo's generate, products through oneDNN"] = (lambda: run_nemo(actor, batch, args), 1)
    transformers = []

    def with_transformers():
        transformers[:] = transformers or [of_transformers(args)]
        return run_transformers(transformers[0], batch, args, actor.tokenizer.eos_id)

    runs["transformers' generate"] = (with_transformers, 1)

    unknown = sorted(set(args.only or ()) - set(runs))
    if unknown:
        raise SystemExit(f"--only: there is no {', '.join(unknown)}; there are {', '.join(runs)}")

    results = {"machine": hardware(), "copy_gb_per_s": bandwidth / 1e9, "runs": {}}
    print(json.dumps(results["machine"]))
    print(f"copy {bandwidth / 1e9:.0f} GB/s; {num_rows} rows of {args.new_tokens} new tokens", flush=True)
    print(f"{'':40}{'tokens/s':>10}{'spread':>8}{'roofline':>10}{'first, s':>10}{'peak, GiB':>11}")
    for name, (work, repeats) in runs.items():
        if args.only and name not in args.only:
            continue
        with contextlib.nullcontext() if "anew" in name else inference(actor):
            found = measure(work, repeats)
        if "geometric" in name:
            engine.release()
        if "geometric" not in name:
            limit = roofline(actor, batch, args, 256 if "256" in name else num_rows, bandwidth)
            found["share_of_roofline"] = found["tokens_per_s"] / limit
        share = f"{found['share_of_roofline']:.0%}" if "share_of_roofline" in found else ""
        print(
            f"{name:40}{found['tokens_per_s']:>10,.0f}{found['spread']:>8.1%}{share:>10}{found['first_s']:>10.1f}"
            f"{found['peak_gib']:>11.1f}", flush=True,
        )  # fmt: skip
        results["runs"][name] = found
    say_verdicts(verdicts(results["runs"], num_rows, args.cpu))
    if args.save:
        args.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
