"""Checks of `model.peft` before any model is loaded."""

import difflib

from omegaconf import DictConfig, OmegaConf

from nemo_aligner.compat import virtual_stages
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import CONFIG_FILE, naming, opened
from nemo_aligner.utils.value_rules import COUNT, Rule, check_section, is_count, is_number

PEFT_KEY = "model.peft.restore_from_path"
SECTION = "model.peft.lora_tuning"
TARGETS = {
    "attention_qkv": ("attention_qkv",),
    "attention_dense": ("attention_dense",),
    "mlp_fc1": ("mlp_fc1",),
    "mlp_fc2": ("mlp_fc2",),
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
}
INIT_METHODS = ("xavier", "normal", "kaiming", "zero")
LORA_KEYS = (
    "target_modules", "adapter_dim", "alpha", "adapter_dropout", "dropout_position", "column_init_method",
    "row_init_method", "layer_selection", "weight_tying", "position_embedding_strategy", "variant",
)  # fmt: skip

_INIT_METHOD = Rule(lambda value: value in INIT_METHODS, f"one of {', '.join(INIT_METHODS)}")
_REQUIRED = {
    "target_modules": Rule(
        lambda value: OmegaConf.is_list(value) and len(value) > 0 and all(target in TARGETS for target in value),
        f"a list of {', '.join(TARGETS)}",
    ),
    "adapter_dim": COUNT,
    "adapter_dropout": Rule(lambda value: is_number(value) and 0 <= value < 1, "in [0, 1)"),
}
_OPTIONAL = {
    "alpha": Rule(lambda value: value is None or (is_number(value) and value > 0), "above 0, or null for adapter_dim"),
    "dropout_position": Rule(lambda value: value in ("pre", "post"), "pre or post"),
    "column_init_method": _INIT_METHOD,
    "row_init_method": _INIT_METHOD,
    "layer_selection": Rule(
        lambda value: value is None or (OmegaConf.is_list(value) and len(value) > 0 and all(map(is_count, value))),
        "a list of layer numbers from 1 on, or null for all layers",
    ),
    "weight_tying": Rule(lambda value: not value, "False: NeMo 2.0 cannot build tied LoRA adapters"),
    "position_embedding_strategy": Rule(lambda value: value is None, "null: it is for tied ones"),
    "variant": Rule(lambda value: value == "nemo", "nemo: separate adapters of fused layers are not supported"),
}


def check_peft(cfg: DictConfig) -> None:
    """Refuse a resolved configuration whose adapters could not be built, trained or restored.

    Raises:
        ConfigError: one line with the key, its value and the fix.
    """
    peft = cfg.model.get("peft") or OmegaConf.create({"peft_scheme": "none"})
    if not check_scheme(peft):
        return
    if cfg.model.optim.name == "distributed_fused_adam":
        raise ConfigError(
            "model.optim.name=distributed_fused_adam cannot train adapters; use mcore_distributed_optim or fused_adam"
        )
    for key in peft.get("lora_tuning") or ():
        if key not in LORA_KEYS:
            near = difflib.get_close_matches(key, LORA_KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{SECTION}.{key} is not a known key; did you mean {SECTION}.{near}?")
    check_lora_tuning(peft.get("lora_tuning"), cfg.model)
    _check_layout(peft.lora_tuning, cfg.model)
    if peft.get("restore_from_path") is not None:
        _check_same(stored_lora_config(peft.restore_from_path), cfg.model, f"{PEFT_KEY}: {peft.restore_from_path}")


def check_scheme(peft: DictConfig) -> bool:
    """Whether the configuration asks for adapters.

    Raises:
        ConfigError: for an unsupported scheme, or adapters to restore without a scheme.
    """
    scheme = peft.get("peft_scheme") or "none"
    if scheme not in ("none", "lora"):
        why = " (NeMo's is for Stable Diffusion)" if scheme == "sdlora" else ""
        raise ConfigError(f"model.peft.peft_scheme={scheme} is not supported{why}; use lora or none")
    if scheme == "none" and peft.get("restore_from_path") is not None:
        raise ConfigError(f"{PEFT_KEY}={peft.restore_from_path} needs model.peft.peft_scheme=lora, not none")
    return scheme == "lora"


def check_lora_tuning(lora: DictConfig | None, model: DictConfig) -> None:
    """Refuse adapters that NeMo cannot build for the model, or that could never learn.

    Raises:
        ConfigError: naming the key, its value and the fix.
    """
    check_section(OmegaConf.create() if lora is None else lora, _REQUIRED, _OPTIONAL, prefix=f"{SECTION}.")
    if lora.get("column_init_method") == lora.get("row_init_method", "zero") == "zero":
        raise ConfigError(
            f"{SECTION}: column_init_method and row_init_method are both zero, so no gradient reaches them"
        )
    beyond = [number for number in lora.get("layer_selection") or () if number > model.num_layers]
    if beyond:
        raise ConfigError(
            f"{SECTION}.layer_selection={beyond} must be within the model's layers 1 to {model.num_layers}"
        )
    if model.get("qk_layernorm"):
        raise ConfigError(
            "model.qk_layernorm: NeMo 2.0 leaves these norms out where there are adapters; train all weights"
        )
    if model.get("num_moe_experts"):
        raise ConfigError("model.num_moe_experts: adapters of a mixture of experts are not supported")
    activation = str(model.get("activation"))
    if "mlp_fc1" in _expanded(lora.target_modules) and activation in ("swiglu", "geglu", "reglu"):
        raise ConfigError(
            f"model.activation={activation}: NeMo 2.0 gives mlp_fc1 adapters of a wrong size; set "
            f"model.activation=fast-{activation}, which computes the same"
        )


def stored_lora_config(path: str, key: str = PEFT_KEY) -> DictConfig:
    """The model config in an archive of adapters.

    Raises:
        ConfigError: naming `key` and the archive, if it holds something else.
    """
    with opened(path, key, only={CONFIG_FILE}) as archive:
        cfg = archive.config()
        with naming(archive.where):
            check_is_lora(cfg)
    return cfg


def check_is_lora(cfg: DictConfig) -> None:
    """Refuse the stored config of anything but LoRA adapters.

    Raises:
        ConfigError: naming the scheme found.
    """
    scheme = OmegaConf.select(cfg, "peft.peft_scheme") or "none"
    if scheme != "lora":
        raise ConfigError(f"it does not hold LoRA adapters (its peft.peft_scheme is {scheme})")
    check_lora_tuning(cfg.peft.get("lora_tuning"), cfg)


def check_same_model(stored: DictConfig, model: DictConfig, where: str) -> None:
    """Refuse adapters that were made for a model of different sizes.

    Raises:
        ConfigError: naming the key and both values.
    """
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        if stored.get(key) != model.get(key):
            raise ConfigError(
                f"{where}: its adapters are of a model with {key}={stored.get(key)}, not {model.get(key)}"
            )


def _check_same(stored: DictConfig, model: DictConfig, where: str) -> None:
    check_same_model(stored, model, where)
    theirs, ours = _what_shapes(stored.peft.lora_tuning), _what_shapes(model.peft.lora_tuning)
    for key, value in ours.items():
        if theirs[key] != value:
            raise ConfigError(
                f"{where}: it was trained with lora_tuning.{key}={theirs[key]}; set {SECTION}.{key} to "
                f"that, not {value}"
            )


def _what_shapes(lora: DictConfig) -> dict:
    """The settings that determine which adapter weights exist and how they are scaled."""
    layers = lora.get("layer_selection")
    return {
        "target_modules": sorted(_expanded(lora.target_modules)),
        "adapter_dim": lora.adapter_dim,
        "alpha": lora.adapter_dim if lora.get("alpha") is None else lora.alpha,
        "layer_selection": None if layers is None else sorted(set(layers)),
    }


def _check_layout(lora: DictConfig, model: DictConfig) -> None:
    tensor_size = model.get("tensor_model_parallel_size", 1)
    num_stages = model.get("pipeline_model_parallel_size", 1)
    if lora.adapter_dim % tensor_size:
        raise ConfigError(
            f"{SECTION}.adapter_dim={lora.adapter_dim} must be a multiple of "
            f"model.tensor_model_parallel_size={tensor_size}"
        )
    if tensor_size > 1 and model.get("sequence_parallel"):
        raise ConfigError(
            "model.sequence_parallel=True is not supported with model.peft.peft_scheme=lora; set it to False"
        )
    if model.get("perform_initialization") is False:
        raise ConfigError("model.perform_initialization=False would leave new adapters uninitialized; set it to True")
    selected = lora.get("layer_selection") or range(1, model.num_layers + 1)
    num_chunks = num_stages * virtual_stages.count(model)
    chunks = {(number - 1) * num_chunks // model.num_layers for number in selected}
    if len(chunks) < num_chunks:
        virtual = f" * model.virtual_pipeline_model_parallel_size={num_chunks // num_stages}"
        raise ConfigError(
            f"{SECTION}.layer_selection={list(selected)} must have a layer in each of the "
            f"model.pipeline_model_parallel_size={num_stages}{virtual if num_chunks > num_stages else ''} stages"
        )


def _expanded(targets) -> set[str]:
    return {target for name in targets for target in TARGETS[name]}
