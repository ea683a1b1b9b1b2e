"""Saving and restoring a training checkpoint, compared with the disk's own rate and a plain copy of the state.

    python -m benchmarks.checkpoint

A single process saves a model with AdamW's state (weights and two moments in float32) as in training. The disk's rate
comes from writing and reading a plain file of the checkpoint's size in 4 MiB blocks, before each save and each restore.
Every write ends with fsync, and before every read the system is told to drop the file from its cache. The output gives
medians, with the range in brackets.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import hydra
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.utils.checkpoints import saving_in_background
from nemo_aligner.utils.train_script_utils import (
    add_custom_checkpoint_callback,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo

ROOT = Path(__file__).resolve().parents[1]
BLOCK = bytearray(os.urandom(4 * 2**20))


def build(model_path: Path, folder: Path, overrides: list[str]):
    """Everything the training script sets up before its loop: the trainer, the policy and the checkpoint callback."""
    (folder / "prompts.jsonl").write_text('{"text": "one"}\n' * 16)
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = hydra.compose("quickstart", [
            f"pretrained_checkpoint.restore_from_path={model_path}", f"exp_manager.explicit_log_dir={folder / 'run'}",
            "model.data.data_prefix={train: [PROMPTS], validation: [PROMPTS], test: [PROMPTS]}".replace(
                "PROMPTS", str(folder / "prompts.jsonl")
            ),
            f"model.rs.reward.target={ROOT / 'examples/quickstart/reward.py'}:sentiment", "model.rs.num_val_samples=32",
            "exp_manager.checkpoint_callback_params.save_last=True", "+model.optim.sched.max_steps=100", *overrides,
        ])  # fmt: skip
    cfg.model = load_and_override_model_config(str(model_path), cfg.model)
    trainer = resolve_and_create_trainer(cfg, "rs")
    exp_manager(trainer, cfg.exp_manager)
    model = load_from_nemo(MegatronGPTRSModel, cfg.model, trainer, restore_path=str(model_path))
    init_peft(model, cfg.model)
    init_distributed(trainer, model)
    rows = [torch.zeros(1)] * 16
    init_using_ptl(trainer, model, torch.utils.data.DataLoader(rows), rows)
    optimizer = model.optimizers(use_pl_optimizer=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return trainer, model, add_custom_checkpoint_callback(trainer, model)


def seconds_of(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def write_plainly(path: Path, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(-(-size // len(BLOCK))):
            file.write(BLOCK)
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    block = bytearray(len(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def drop_from_cache(path: Path) -> None:
    """Ask the system to drop files from its cache. Synced files can be dropped; whether they are is not checked."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Checkpoints:
    """Saves and restores a run."""

    def __init__(self, trainer, model, callback):
        self.trainer, self.model, self.callback, self.step = trainer, model, callback, 0

    def save(self, is_train_end: bool = False, **metrics: float) -> None:
        self.step += 1
        counters = {name: torch.tensor(self.step) for name in ("step", "consumed_samples", "rs_optimization_step")}
        metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        self.callback.custom_save({**counters, "epoch": torch.tensor(0), **metrics}, is_train_end=is_train_end)

    @property
    def path(self) -> Path:
        return Path(self.callback.last_model_path.removesuffix(self.callback.FILE_EXTENSION))

    def restore(self) -> None:
        """Restore as at the start of a resumed run."""
        connector = self.trainer._checkpoint_connector
        connector._restore_modules_and_callbacks(str(self.path))
        connector.restore_training_state()
        connector.resume_end()

    def state(self) -> list[torch.Tensor]:
        """The weights and the optimizer's moments (not copies)."""
        optimizer = self.model.optimizers(use_pl_optimizer=False)
        moments = [tensor for tensor in nested_values(optimizer.state_dict()["state"]) if tensor.ndim > 0]
        return [parameter.detach() for parameter in self.model.parameters()] + moments


def copy_to_host(state: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to("cpu", copy=True) for tensor in state]


def copy_again(state: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    for copy, tensor in zip(copies, state, strict=True):
        copy.copy_(tensor)


def measure(checkpoints: Checkpoints, folder: Path, repeats: int) -> tuple[int, dict[str, list[float]]]:
    """The bytes of a checkpoint, and the seconds of each operation, repeated."""
    seconds = defaultdict(list)
    plain = folder / "plain"
    with saving_in_background(checkpoints.callback):
        time.sleep(5)  # training would generate rollouts meanwhile
        seconds["first block"].append(seconds_of(checkpoints.save))
    size = sum(file.stat().st_size for file in checkpoints.path.rglob("*"))
    for _ in range(repeats):
        seconds["write"].append(seconds_of(write_plainly, plain, size))
        seconds["save"].append(seconds_of(checkpoints.save))
        drop_from_cache(plain)
        seconds["read"].append(seconds_of(read_plainly, plain))
        drop_from_cache(checkpoints.path)
        seconds["restore"].append(seconds_of(checkpoints.restore))
        state = checkpoints.state()
        copies = copy_to_host(state)
        seconds["copy again"].append(seconds_of(copy_again, state, copies))
        del copies
        seconds["copy"].append(seconds_of(copy_to_host, state))
        start = time.perf_counter()
        with saving_in_background(checkpoints.callback):
            checkpoints.save()
            seconds["block"].append(time.perf_counter() - start)
        seconds["behind"].append(time.perf_counter() - start)
    return size, seconds


def report(size: int, seconds: dict[str, list[float]]) -> None:
    """Print the rates relative to the disk's, and how long training waits relative to a plain copy."""
    medians = {what: statistics.median(times) for what, times in seconds.items()}

    def line(name: str, what: str, verdict: str = "") -> None:
        spread = f"({min(seconds[what]):.2f}-{max(seconds[what]):.2f})"
        print(f"{name:36}{medians[what]:>8.2f} {spread:>15}{size / medians[what] / 1e6:>7.0f}  {verdict}".rstrip())

    print(f"{'':36}{'seconds':>8}{'MB/s':>23}")
    for what, plainly in (("save", "write"), ("restore", "read")):
        line(f"disk, plain {plainly}", plainly)
        share = medians[plainly] / medians[what]
        line(what, what, f"{share:.0%} of the disk's rate, target 50 %: {'PASS' if share >= 0.5 else 'FAIL'}")
    line("plain copy to host memory", "copy")
    for name, what in (("training waits, first save", "first block"), ("training waits, later saves", "block")):
        times = medians[what] / medians["copy"]
        line(name, what, f"{times:.2f} of the copy, target 1: {'PASS' if times <= 1 else 'FAIL'}")
    line("  of which copying", "copy again")
    line("until a later save is on the disk", "behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct.nemo")
    parser.add_argument("--folder", type=Path, default=".", help="where to write, on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="settings of the run, as for the training script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(*build(args.model.resolve(), Path(folder).resolve(), args.overrides))
        state = checkpoints.state()
        print(
            f"{args.model.name}: {sum(tensor.nbytes for tensor in state) / 1e9:.2f} GB of weights and moments ", end=""
        )
        print(f"in {len(state)} tensors, {torch.get_num_threads()} threads")
        del state
        report(*measure(checkpoints, Path(folder), args.repeats))


if __name__ == "__main__":
    main()
