"""An interpolation that cannot be resolved is refused with one line that names its key and what that needs."""

import pytest
from omegaconf import OmegaConf

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.interpolations import resolve_interpolations
from nemo_aligner.utils.train_script_utils import exit_on_config_error

OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)


def refusal(settings: dict) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_interpolations(OmegaConf.create(settings))
    return str(error.value)


def test_what_can_be_resolved_is_resolved_in_place():
    cfg = OmegaConf.create({"a": {"b": 3, "twice": "${multiply:${.b}, 2}"}, "c": ["${a.twice}"], "unset": "???"})
    resolve_interpolations(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == {"a": {"b": 3, "twice": 6}, "c": [6], "unset": "???"}


SIZE = "${multiply:${model.tensor_model_parallel_size}, ${model.pipeline_model_parallel_size}}"


@pytest.mark.parametrize(
    "model, name, state",
    [
        ({"tensor_model_parallel_size": None, "pipeline_model_parallel_size": 1}, "tensor", "None"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": None}, "pipeline", "None"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": {"a": 1}}, "pipeline", "{'a': 1}"),
        ({"pipeline_model_parallel_size": 1}, "tensor", "not set"),
    ],
)
def test_a_value_that_its_function_cannot_take_is_named_with_what_it_must_be(model, name, state):
    assert refusal({"exp_manager": {"size": SIZE}, "model": model}) == (
        f"exp_manager.size={SIZE} needs model.{name}_model_parallel_size, which is {state}; it must be a positive "
        "whole number"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        # relative to its own section, to the parent section, and within a list
        ({"a": {"b": "${.c}"}}, "a.b=${.c} needs a.c, which is not set; it must be set"),
        ({"a": {"b": {"c": "${..d}"}}}, "a.b.c=${..d} needs a.d, which is not set; it must be set"),
        ({"a": [1, {"b": "${c}"}]}, "a.1.b=${c} needs c, which is not set; it must be set"),
        ({"a": "${multiply:${b}, 2}", "b": None}, "a=${multiply:${b}, 2} needs b, which is None; it must be set"),
        # the innermost failing one is named, also if it is reached through a section
        ({"a": "${b}", "b": "${c}", "c": "${d}"}, "c=${d} needs d, which is not set; it must be set"),
        ({"a": "${b.key}", "b": "${d}"}, "b=${d} needs d, which is not set; it must be set"),
        ({"a": "${b}", "b": "${a}"}, "a=${b} cannot be had: Recursive interpolation detected"),
        ({"a": "${nope:1}"}, "a=${nope:1} cannot be had: Unsupported interpolation type nope"),
        (
            {"a": "${oc.env:NEMO_ALIGNER_NOT_THERE}"},
            "a=${oc.env:NEMO_ALIGNER_NOT_THERE} cannot be had: KeyError raised while resolving interpolation: "
            "\"Environment variable 'NEMO_ALIGNER_NOT_THERE' not found\"",
        ),
    ],
)
def test_the_key_at_fault_is_named(settings, message):
    assert refusal(settings) == message


@pytest.mark.parametrize(
    "value, reason", [("${oc.env:NEMO_ALIGNER_NOT_THERE}", "Environment variable"), ("???", "Missing mandatory value")]
)
def test_a_key_read_before_the_rest_is_resolved_is_named_too(capsys, value, reason):
    cfg = OmegaConf.create({"pretrained_checkpoint": {"restore_from_path": value}})
    with pytest.raises(SystemExit) as exit, exit_on_config_error():
        print(cfg.pretrained_checkpoint.restore_from_path)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: pretrained_checkpoint.restore_from_path: "), lines
    assert reason in lines[0]
