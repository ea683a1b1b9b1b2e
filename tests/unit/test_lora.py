"""LoRA adapters in one process: what they compute, which weights are trained, archives, merging, what is refused."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_aligner.convert.merge_lora import merge_lora_
from nemo_aligner.convert.name_map import hf_names, pack, unpack
from nemo_aligner.convert.nemo_to_hf import export
from nemo_aligner.models.nlp.gpt.lora import _join, _split, adapters_of, load_adapters_, read_adapters
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.peft_checks import check_peft
from nemo_aligner.utils.train_script_utils import init_peft
from tests.tiny import load_actor, prompt_batch

PROMPTS = ["the quick brown", "one two three four five six", "a good", "kind and it ends"]
BASE_LAYER = {
    "lora_kqv_adapter": "linear_qkv",
    "lora_dense_attention_adapter": "linear_proj",
    "lora_hto4h_adapter": "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
}
TARGETS = {
    "attention_qkv": {"linear_qkv"},
    "attention_dense": {"linear_proj"},
    "mlp_fc1": {"linear_fc1"},
    "mlp_fc2": {"linear_fc2"},
    "attention": {"linear_qkv", "linear_proj"},
    "mlp": {"linear_fc1", "linear_fc2"},
    "all": {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"},
}


def lora_tuning(**changes) -> dict:
    return {
        "target_modules": ["all"], "adapter_dim": 8, "adapter_dropout": 0.0, "column_init_method": "xavier",
        "row_init_method": "zero", "layer_selection": None, "weight_tying": False, "position_embedding_strategy": None,
        **changes,
    }  # fmt: skip


def adapted(nemo_path, restore_from_path=None, model=None, **lora):
    """The tiny actor with adapters."""
    peft = {"peft_scheme": "lora", "restore_from_path": restore_from_path, "lora_tuning": lora_tuning(**lora)}
    actor = load_actor(nemo_path, peft=peft, micro_batch_size=2, global_batch_size=4, **(model or {}))
    init_peft(actor, actor.cfg)
    return actor


def randomize_(actor, seed: int = 3, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(actor):
            for weight in adapter.module.parameters():
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))


def with_merged_weights(hf_folder, actor, alpha_over_dim: float) -> LlamaForCausalLM:
    """The Hugging Face model with W + alpha / dim * B A in place of every adapted W, in plain PyTorch."""
    llama = AutoModelForCausalLM.from_pretrained(hf_folder)
    parameters, of_llama = dict(actor.model.named_parameters()), dict(llama.named_parameters())
    with torch.no_grad():
        for name, linear_in in parameters.items():
            if not name.endswith("linear_in.weight"):
                continue
            module, adapter = name.removesuffix(".linear_in.weight").split(".adapter_layer.")
            linear_out = parameters[name.replace("linear_in", "linear_out")]
            names = hf_names(f"{module}.{BASE_LAYER[adapter]}.weight")
            deltas = unpack(alpha_over_dim * linear_out @ linear_in, len(names), num_heads=4, num_groups=2)
            for hf_name, delta in zip(names, deltas, strict=True):
                of_llama[hf_name].add_(delta)
    return llama.eval()


def greedy_rollouts(actor, max_length: int = 16) -> list[list[int]]:
    rows = [actor.tokenizer.text_to_ids(prompt) for prompt in PROMPTS]
    actor.prepare_for_inference()
    output = actor.infer(prompt_batch(rows, actor.tokenizer.eos_id, max_length))
    actor.finish_inference()
    return [
        tokens[:length] for tokens, length in
        zip(output["response_tokens"].tolist(), output["response_lengths"].tolist(), strict=True)
    ]  # fmt: skip


def hf_greedy(llama, actor, max_length: int = 16) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([actor.tokenizer.text_to_ids(prompt)])
        # embedding rows beyond the tokenizer's entries are padding
        padding = list(range(actor.tokenizer.vocab_size, llama.config.vocab_size))
        answer = llama.generate(ids, max_new_tokens=max_length, do_sample=False, suppress_tokens=padding)
        rows.append(answer[0].tolist())
    return rows


@torch.no_grad()
def logits(actor, tokens: torch.Tensor) -> torch.Tensor:
    actor.prepare_for_inference()
    output = actor.model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None, labels=None)
    actor.finish_inference()
    return output


def random_tokens() -> torch.Tensor:
    return torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def training_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 300, (4, 22), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(4, 21)
    mask[:, 6:14] = 1
    return {"response_tokens": tokens, "mask": mask}


def train_once(actor) -> float:
    actor.prepare_for_training()
    loss, _ = actor.get_loss_and_metrics(training_batch(), forward_only=False)
    actor.finish_training_step()
    return loss


# What adapters compute


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_adds_alpha_over_dim_times_b_a_to_its_weights(tiny_hf, tiny_nemo, target):
    actor = adapted(tiny_nemo, target_modules=[target], adapter_dim=4, alpha=6)
    randomize_(actor)
    assert {(adapter.prefix.split(".")[3], BASE_LAYER[adapter.name]) for adapter in adapters_of(actor)} == set(
        itertools.product("0123", TARGETS[target])
    )
    expected = with_merged_weights(tiny_hf, actor, alpha_over_dim=6 / 4)
    with torch.no_grad():
        ours, theirs = logits(actor, random_tokens()), expected(random_tokens()).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_greedy_rollouts_are_those_of_the_merged_model(tiny_hf, tiny_nemo):
    actor = adapted(tiny_nemo)
    base = greedy_rollouts(actor)
    assert base == hf_greedy(AutoModelForCausalLM.from_pretrained(tiny_hf), actor)  # new adapters add nothing
    randomize_(actor)
    assert greedy_rollouts(actor) == hf_greedy(with_merged_weights(tiny_hf, actor, alpha_over_dim=1.0), actor)
    assert all(ours != theirs for ours, theirs in zip(greedy_rollouts(actor), base, strict=True))


def test_selected_layers_alone_are_adapted(tiny_nemo):
    actor = adapted(tiny_nemo, target_modules=["attention_qkv"], layer_selection=[2, 4])
    assert [adapter.prefix for adapter in adapters_of(actor)] == [
        f"model.decoder.layers.{index}.self_attention.adapter_layer.lora_kqv_adapter." for index in (1, 3)
    ]


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_is_for_training_only(tiny_nemo, position):
    actor = adapted(tiny_nemo, adapter_dropout=0.5, dropout_position=position)
    randomize_(actor)
    plain = adapted(tiny_nemo)
    randomize_(plain)
    assert torch.equal(logits(actor, random_tokens()), logits(plain, random_tokens()))
    torch.manual_seed(0)
    losses = [train_once(actor) for _ in range(2)]
    assert losses[0] != losses[1]
    assert train_once(plain) == train_once(plain)


# Standard deviations of the entries of 4 x 64 and 128 x 4 weights.
INIT_STDS = {
    "xavier": ((2 / (64 + 4)) ** 0.5, (2 / (128 + 4)) ** 0.5),
    "normal": (0.2, 0.2),
    "kaiming": ((1 / (3 * 64)) ** 0.5, (1 / (3 * 4)) ** 0.5),
    "zero": (0.0, 0.0),
}


@pytest.mark.parametrize(
    ("column", "row"), [("xavier", "zero"), ("normal", "kaiming"), ("kaiming", "normal"), ("zero", "xavier")]
)
def test_init_methods(tiny_nemo, column, row):
    torch.manual_seed(0)
    actor = adapted(
        tiny_nemo, target_modules=["attention_qkv"], adapter_dim=4, column_init_method=column, row_init_method=row
    )
    modules = [adapter.module for adapter in adapters_of(actor)]
    for found, expected in (
        (torch.cat([module.linear_in.weight for module in modules]).std(), INIT_STDS[column][0]),
        (torch.cat([module.linear_out.weight for module in modules]).std(), INIT_STDS[row][1]),
    ):
        assert found.item() == pytest.approx(expected, rel=0.1)


# Training


@pytest.mark.parametrize("recompute", [None, "full"])
def test_gradients_are_those_of_the_merged_form(tiny_hf, tiny_nemo, recompute):
    model = {} if recompute is None else {
        "activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform",
        "activations_checkpoint_num_layers": 1,
    }  # fmt: skip
    actor = adapted(tiny_nemo, model=model, alpha=4)
    randomize_(actor)
    greedy_rollouts(actor)  # as before every training phase
    train_once(actor)
    gradients = {name: parameter.grad for name, parameter in actor.model.named_parameters()}
    assert all((gradient is not None) == ("adapter_layer" in name) for name, gradient in gradients.items())

    llama = with_merged_weights(tiny_hf, actor, alpha_over_dim=0.5)
    batch = training_batch()
    logprobs = llama(batch["response_tokens"]).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, batch["response_tokens"][:, 1:, None]).squeeze(-1)
    (-(chosen * batch["mask"]).sum() / batch["mask"].sum()).backward()
    of_llama = dict(llama.named_parameters())
    for adapter in adapters_of(actor):
        module = adapter.prefix.removeprefix("model.").split("adapter_layer")[0]
        names = hf_names(f"{module}{BASE_LAYER[adapter.name]}.weight")
        of_weight = pack([of_llama[name].grad for name in names], num_groups=2)
        linear_in, linear_out = adapter.module.linear_in.weight, adapter.module.linear_out.weight
        for found, expected in (
            (linear_out.grad, 0.5 * of_weight @ linear_in.T),
            (linear_in.grad, 0.5 * linear_out.T @ of_weight),
        ):
            assert (found - expected).norm() <= 1e-4 * expected.norm(), adapter.prefix


# Archives


@pytest.fixture(scope="module")
def saved(tiny_nemo, tmp_path_factory):
    """An archive of random adapters, and greedy rollouts with them."""
    path = tmp_path_factory.mktemp("lora") / "adapters.nemo"
    actor = adapted(tiny_nemo, alpha=4)
    randomize_(actor)
    actor.save_to(str(path))
    return path, greedy_rollouts(actor)


def test_an_archive_holds_adapters_alone_and_restores(saved, tiny_nemo):
    path, rollouts = saved
    tensors = read_adapters(path)
    assert len(tensors) == 4 * 4 * 2 and all(".adapter_layer.lora_" in name for name in tensors)
    assert greedy_rollouts(adapted(tiny_nemo, restore_from_path=str(path), alpha=4)) == rollouts
    assert greedy_rollouts(adapted(tiny_nemo, alpha=4)) != rollouts


def test_nemo_itself_restores_the_archive(saved, tiny_nemo):
    path, rollouts = saved
    actor = load_actor(tiny_nemo)
    actor.load_adapters(str(path), map_location="cpu")
    assert greedy_rollouts(actor) == rollouts


def test_parts_of_four_ranks_make_the_whole():
    cfg = OmegaConf.create({"activation": "fast-swiglu"})
    kinds = [f"{adapter}.{part}" for adapter in BASE_LAYER for part in ("linear_in.weight", "linear_out.weight")]
    whole = torch.arange(16 * 8).reshape(16, 8)
    for name in kinds:
        assert torch.equal(_join(_split(whole, name, 4, cfg), name, cfg), whole)
    # rows 0 to 7 are gate, rows 8 to 15 up: the first of four ranks has two of each
    assert _split(whole, "lora_hto4h_adapter.linear_out.weight", 4, cfg)[0][:, 0].tolist() == [0, 8, 64, 72]
    assert _split(whole, "lora_kqv_adapter.linear_out.weight", 4, cfg)[0][:, 0].tolist() == [0, 8, 16, 24]
    assert _split(whole, "lora_4htoh_adapter.linear_in.weight", 4, cfg)[0][0].tolist() == [0, 1]


def test_adapters_of_another_shape_are_refused(saved, tiny_nemo):
    path, _ = saved
    for lora, message in (
        ({"adapter_dim": 4}, r"the parameter model\.decoder\.layers\.0\..*linear_in\.weight has the shape \(8, 64\)"),
        ({"target_modules": ["mlp"]}, r"the parameter model\.decoder\.layers\.0\.self_attention.* has no place"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.peft\.restore_from_path: .*adapters\.nemo: {message}"):
            load_adapters_(adapted(tiny_nemo, **lora), path)


# Merging


def test_merging_keeps_the_rollouts_and_leaves_an_ordinary_model(saved, tiny_nemo, tmp_path):
    path, rollouts = saved
    actor = adapted(tiny_nemo, restore_from_path=str(path), alpha=4)
    names = {name for name, _ in load_actor(tiny_nemo).named_parameters()}
    merge_lora_(actor)
    assert greedy_rollouts(actor) == rollouts
    assert {name for name, parameter in actor.named_parameters() if parameter.requires_grad} == names
    actor.save_to(str(tmp_path / "merged.nemo"))
    assert greedy_rollouts(load_actor(tmp_path / "merged.nemo")) == rollouts


def test_an_export_with_adapters_generates_what_the_actor_does(saved, tiny_nemo, tmp_path):
    path, rollouts = saved
    export(tiny_nemo, tmp_path / "hf", lora_path=path)
    assert hf_greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load_actor(tiny_nemo)) == rollouts


def test_an_export_refuses_what_are_no_adapters_of_the_model(saved, tiny_nemo, tmp_path):
    path, _ = saved
    with pytest.raises(ConfigError, match=r"^--lora: the archive .* does not hold LoRA adapters"):
        export(tiny_nemo, tmp_path / "hf", lora_path=tiny_nemo)
    with pytest.raises(ConfigError, match=r"model\.peft\.peft_scheme is 'lora': .* give it as --lora"):
        export(path, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


# What is refused before a model is loaded


def run_config(**changes):
    cfg = OmegaConf.create(
        {
            "model": {
                "peft": {"peft_scheme": "lora", "restore_from_path": None, "lora_tuning": lora_tuning()},
                "optim": {"name": "adamw"}, "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128,
                "num_attention_heads": 4, "num_query_groups": 2, "activation": "fast-swiglu",
                "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False,
            }
        }
    )  # fmt: skip
    for key, value in changes.items():
        OmegaConf.update(cfg, f"model.{key}", value, force_add=True)
    return cfg


LORA = "peft.lora_tuning"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft.peft_scheme": "lorra"}, r"model\.peft\.peft_scheme=lorra is not supported; use lora or none"),
        ({"peft.peft_scheme": "sdlora"}, r"model\.peft\.peft_scheme=sdlora is not supported \(.*Stable Diffusion\)"),
        (
            {"peft.peft_scheme": "none", "peft.restore_from_path": "x.nemo"},
            r"model\.peft\.restore_from_path=x\.nemo needs model\.peft\.peft_scheme=lora, not none",
        ),
        ({"peft.restore_from_path": "x.nemo"}, r"model\.peft\.restore_from_path: x\.nemo does not exist"),
        ({"optim.name": "distributed_fused_adam"}, r"model\.optim\.name=distributed_fused_adam cannot train adapters"),
        ({f"{LORA}.target_modules": ["attn"]}, r".*target_modules=\['attn'\] must be a list of attention_qkv"),
        ({f"{LORA}.target_modules": []}, r".*target_modules=\[\] must be a list"),
        ({f"{LORA}.target_modules": "all"}, r".*target_modules='all' must be a list"),
        ({f"{LORA}.adapter_dim": 0}, r".*adapter_dim=0 must be a positive whole number"),
        ({f"{LORA}.alpha": 0}, r".*alpha=0 must be above 0"),
        ({f"{LORA}.adapter_dropout": 1.0}, r".*adapter_dropout=1\.0 must be in \[0, 1\)"),
        ({f"{LORA}.dropout_position": "mid"}, r".*dropout_position='mid' must be pre or post"),
        ({f"{LORA}.column_init_method": "ones"}, r".*column_init_method='ones' must be one of xavier"),
        ({f"{LORA}.row_init_method": "ones"}, r".*row_init_method='ones' must be one of xavier"),
        ({f"{LORA}.column_init_method": "zero"}, r".*are both zero"),
        ({f"{LORA}.layer_selection": [0]}, r".*layer_selection=\[0\] must be a list of layer numbers"),
        ({f"{LORA}.layer_selection": []}, r".*layer_selection=\[\] must be a list of layer numbers"),
        ({f"{LORA}.layer_selection": [5]}, r".*layer_selection=\[5\] must be within the model's layers 1 to 4"),
        ({f"{LORA}.weight_tying": True}, r".*weight_tying=True must be False: NeMo 2\.0 cannot"),
        ({f"{LORA}.position_embedding_strategy": "add"}, r".*position_embedding_strategy='add' must be null"),
        ({f"{LORA}.variant": "canonical"}, r".*variant='canonical' must be nemo"),
        ({f"{LORA}.adapter_dims": 8}, r".*adapter_dims is not a known key; did you mean .*adapter_dim\?"),
        ({"tensor_model_parallel_size": 3}, r".*adapter_dim=8 must be a multiple of .*tensor_model_parallel_size=3"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, r"model\.sequence_parallel=True is not"),
        (
            {"pipeline_model_parallel_size": 2, f"{LORA}.layer_selection": [3, 4]},
            r".*layer_selection=\[3, 4\] must have a layer in each of the model\.pipeline_model_parallel_size=2 stages",
        ),
        (
            {
                "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                f"{LORA}.layer_selection": [1, 2, 3],
            },
            r".* must have a layer in each of the .*_size=2 \* model\.virtual_pipeline_model_parallel_size=2 stages",
        ),
        ({"peft.lora_tuning": None}, r"model\.peft\.lora_tuning\.target_modules is not set"),
        ({"perform_initialization": False}, r"model\.perform_initialization=False would leave new adapters uninit"),
        ({"qk_layernorm": True}, r"model\.qk_layernorm: NeMo 2\.0 leaves these norms out"),
        ({"num_moe_experts": 4}, r"model\.num_moe_experts: adapters"),
        ({"activation": "swiglu"}, r"model\.activation=swiglu: .* set model\.activation=fast-swiglu"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        check_peft(run_config(**changes))
    assert "\n" not in str(error.value)


def test_working_configurations_pass(saved):
    check_peft(run_config())
    check_peft(run_config(**{"peft.peft_scheme": "none"}))
    check_peft(run_config(**{"peft.peft_scheme": None}))
    check_peft(run_config(**{"pipeline_model_parallel_size": 2, f"{LORA}.layer_selection": [2, 3]}))
    check_peft(run_config(**{"peft.restore_from_path": str(saved[0]), f"{LORA}.alpha": 4}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LORA}.adapter_dim": 16, f"{LORA}.alpha": 4}, r"it was trained with lora_tuning\.adapter_dim=8; set"),
        ({}, r"it was trained with lora_tuning\.alpha=4; set model\.peft\.lora_tuning\.alpha to that, not 8"),
        ({f"{LORA}.layer_selection": [1], f"{LORA}.alpha": 4}, r"it was trained with .*layer_selection=None"),
        ({f"{LORA}.target_modules": ["mlp"]}, r"it was trained with lora_tuning\.target_modules=\['attention_dense'"),
        ({"num_layers": 8}, r"its adapters are of a model with num_layers=4, not 8"),
    ],
    ids=str,
)
def test_adapters_that_were_trained_otherwise_are_refused(saved, changes, message):
    with pytest.raises(ConfigError, match=rf"^model\.peft\.restore_from_path: .*adapters\.nemo: {message}"):
        check_peft(run_config(**{"peft.restore_from_path": str(saved[0]), **changes}))


def test_a_whole_model_is_refused_as_adapters(tiny_nemo):
    with pytest.raises(ConfigError, match=r"does not hold LoRA adapters \(its peft\.peft_scheme is none\)"):
        check_peft(run_config(**{"peft.restore_from_path": str(tiny_nemo)}))


def test_adapters_to_restore_without_a_scheme_are_an_error(tiny_nemo):
    with pytest.raises(ConfigError, match=r"needs model\.peft\.peft_scheme=lora, not none"):
        init_peft(None, OmegaConf.create({"peft": {"peft_scheme": "none", "restore_from_path": "x.nemo"}}))
