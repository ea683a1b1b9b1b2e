"""Small fakes for RSTrainer's collaborators, without a real model: a policy with scripted answers and a reward."""

import torch
from omegaconf import OmegaConf

from nemo_aligner.algorithms.rs import RSTrainer
from nemo_aligner.data.nlp.builders import build_dataloader, collate_with_pad_to_max_batch
from nemo_aligner.utils.distributed import Timer

EOS = 9  # neither 0 nor 1, so that a mask padded with it, or with the default padding, is noticed


class Tokenizer:
    eos_id = EOS
    vocab_size = 1000

    def ids_to_text(self, ids):
        return " ".join(map(str, ids))


class Prompts(torch.utils.data.Dataset):
    """The given prompts; those whose index is in `replaced` are flagged as replacements."""

    def __init__(self, prompts, replaced=()):
        self.prompts, self.replaced = prompts, replaced

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        ids = self.prompts[index]
        return {
            "text": torch.tensor(ids), "length": len(ids), "loss_multiplier": index not in self.replaced,
            "prompt_index": index, "is_padding": False,
        }  # fmt: skip

    def record(self, index):
        return {"text": self.prompts[index], "number": index}


class FakeModel:
    """Answers the n-th request for a prompt with the n-th entry of `answers[prompt_index]`, cycling through them.

    An answer is the list of generated ids; one that does not end in `EOS` was cut off. Its only weight is `weight`, and
    the loss is weight * (number of tokens trained on), so the gradient is that number.
    """

    tokenizer = Tokenizer()
    with_distributed_adam = megatron_amp_O2 = False
    trains_with_sequence_parallel = False
    default_answers = ([50, EOS],)
    num_checks = 0  # calls of `check` while it works on a batch
    restored_from = "/models/tiny.nemo"

    def __init__(self, answers=None, events=None, loss_normalization="global_batch"):
        self.cfg = OmegaConf.create({"seed": 5, "rs": {"loss_normalization": loss_normalization}})
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._sampling_params = {"end_strings": []}
        self._length_params = {"max_length": 4}
        self.answers = answers or {}
        self.asked = {}
        self.events = [] if events is None else events
        self.batches = []  # training batches
        self.requests = []  # inference batches
        self.seeds = []

    def __getattr__(self, name):
        if name in ("prepare_for_inference", "finish_inference", "prepare_for_training", "finish_training",
                    "prepare_for_training_step", "finish_training_step", "onload_adam_states"):  # fmt: skip
            return lambda: self.events.append(name)
        raise AttributeError(name)

    def prefetch_adam_states(self, beside_rollouts=False):
        self.events.append("prefetch_adam_states" + " beside rollouts" * beside_rollouts)

    def seed_step(self, step):
        pass

    def seed_sampling(self, *key):
        self.seeds.append(key)

    def get_parameters_with_grad(self):
        return [self.weight]

    def infer(self, batch):
        self.events.append("infer")
        self.requests.append(batch)
        rows = []
        for ids, length, index in zip(batch["text"], batch["length"], batch["prompt_index"].tolist(), strict=True):
            count = self.asked[index] = self.asked.get(index, -1) + 1
            answers = self.answers.get(index, self.default_answers)
            rows.append((ids[:length].tolist(), answers[count % len(answers)]))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.full((len(rows), width), EOS)
        for row, (prompt, answer) in zip(tokens, rows, strict=True):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        return {
            "response_tokens": tokens,
            "response_lengths": torch.tensor([len(prompt) + len(answer) for prompt, answer in rows]),
            "prompt_lengths": batch["length"].clone(),
            "is_end": torch.tensor([answer[-1] == EOS for _, answer in rows]),
        }

    def infer_each(self, batches, check, on_last_rows):
        for number, batch in enumerate(batches, 1):
            if number == len(batches) and on_last_rows is not None:
                on_last_rows()
            for _ in range(self.num_checks):
                check()
            yield self.infer(batch)

    def get_loss_and_metrics(self, batch, forward_only):
        assert not forward_only
        self.events.append("loss")
        self.batches.append(batch)
        (self.weight * batch["mask"].sum()).sum().backward()
        loss = float(batch["mask"].sum())
        return loss, {"loss": loss}


class SecondTokenReward:
    """The reward of a rollout is its first generated id; NaN if that is 99."""

    def __init__(self, events=None):
        self.events = [] if events is None else events
        self.batches = []

    def infer_rm(self, rollouts):
        self.events.append("reward requested")
        self.batches.append(rollouts)
        first = rollouts["response_tokens"].gather(1, rollouts["prompt_lengths"][:, None]).float()
        rewards = torch.where(first == 99, float("nan"), first)
        return self._Future(self.events, rewards)

    class _Future:
        def __init__(self, events, rewards):
            self.events, self.rewards = events, rewards

        def result(self):
            self.events.append("reward awaited")
            return self.rewards


class Logger:
    def __init__(self):
        self.metrics = []  # (prefix, step, metrics)
        self.tables = []  # (key, step, data frame)
        self.finalized = 0

    def log_metrics(self, metrics, step=None, prefix=""):
        self.metrics.append((prefix, step, dict(metrics)))

    def log_table(self, key, dataframe, step):
        self.tables.append((key, step, dataframe))

    def finalize(self):
        self.finalized += 1

    def of(self, prefix):
        return [(step, metrics) for logged, step, metrics in self.metrics if logged == prefix]


class Checkpoints:
    def __init__(self, events):
        self.events = events
        self.saved = []  # (candidates, is_train_end)

    def custom_save(self, monitor_candidates, is_train_end=False, save_top_only=False):
        self.events.append("save")
        self.saved.append((monitor_candidates, is_train_end))


class OutOfTimeAfter(Timer):
    def __init__(self, num_steps):
        super().__init__(None)
        self.left = num_steps

    def is_finished(self):
        self.left -= 1
        return self.left <= 0


def make_trainer(
    prompts=((1,), (2,), (3,), (4,)), n=2, k=1, g=2, mbs=1, gbs=2, model=None, rm=None, val_prompts=((5,),), val_mbs=1,
    num_val=1, replaced=(), val_replaced=(), answers=None, run_timer=None, rollout_dir=None,
    loss_normalization="global_batch", **cfg,
):  # fmt: skip
    events = []
    model = model or FakeModel(answers, events, loss_normalization)
    events = model.events
    full = OmegaConf.create(
        {
            "trainer": {"rs": {
                "max_epochs": 1, "max_steps": -1, "val_check_interval": 0, "save_interval": 0, "model_gbs": gbs,
                "gradient_clip_val": 1.0, "model_mbs": 1, "rollout_batch_seq_length": None, **cfg,
            }},
            "model": {"seed": 5, "data": {"num_workers": 0}},
        }
    )  # fmt: skip
    collate_fn = collate_with_pad_to_max_batch(4, EOS, full)
    load = {"cfg": full, "consumed_samples": 0, "collate_fn": collate_fn, "load_gbs": False}
    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    return RSTrainer(
        cfg=full.trainer.rs,
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        train_dataloader=build_dataloader(dataset=Prompts(prompts, replaced), mbs=mbs, gbs=g, **load),
        val_dataloader=build_dataloader(
            dataset=Prompts(val_prompts, val_replaced), mbs=val_mbs, gbs=num_val, use_random_sampler=False, **load
        ),
        logger=Logger(),
        ckpt_callback=Checkpoints(events),
        run_timer=run_timer or Timer(None),
        num_rollouts_per_prompt=n,
        top_n_rollouts=k,
        rm=rm or SecondTokenReward(events),
        rollout_dir=rollout_dir,
    )
