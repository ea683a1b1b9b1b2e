"""Rewards from a user-defined function.

    model.rs.reward:
      target: package.module.function     # or path/to/file.py:function
      kwargs: {weight: 0.5}               # optional, passed unchanged

The function is called with a batch and returns one number per response:

    def reward(prompts, responses, *, records, weight):
        return [weight * (record["answer"] in response) for response, record in zip(responses, records)]

The first two positional arguments are always the prompt and the response texts: prompts as in the prompt file,
responses decoded without special tokens. Any further arguments are passed only if the function names them (a function
with `**kwargs` gets all):

    response_tokens  list[list[int]]  ids of the response alone, including the token(s) that ended it
    records          list[dict]       the prompt's line of the JSONL file; rollouts of one prompt share one dict
    finished         list[bool]       False if the response was cut off at the length limit

It returns a list or tuple of B numbers, or a 1-D tensor or array. `None` in a list means "cannot be judged": that
rollout is counted, but never selected or trained on. NaN, infinity, a wrong count, a non-number and an exception stop
the run with a `RewardError` that names the prompt.

The function runs in one background thread on the source rank of each replica, on that replica's rollouts, while the
next ones are generated; calls never overlap. Gradients are disabled.
"""

import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.server_utils import (
    BackgroundResult,
    RewardError,
    is_replica_source,
    one_line,
    share_from_source,
)

__all__ = ["PythonRewardModel", "RewardError", "load_reward_function", "score"]

OPTIONAL_COLUMNS = ("response_tokens", "records", "finished")
ROLLOUT_KEYS = ("response_tokens", "response_lengths", "prompt_lengths", "is_end", "records")
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class _Source:
    """The place in the configuration that names a function; `key` is the section of `target` and `kwargs`."""

    key: str
    target: str

    def error(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(one_line(f"{self.key}.target={self.target!r}: {problem}; {remedy}", limit=1000))


def load_reward_function(target: str, kwargs: Mapping | None = None, key: str = "model.rs.reward") -> Callable:
    """Find the user's function and determine its arguments. Needs no model and no process group.

    Args:
        target: `package.module.function` or `path/to/file.py:function`; a relative path is relative to the working
            directory.
        kwargs: constant keyword arguments of the function.
        key: the section of the configuration that they come from, for messages.

    Returns:
        A callable `(prompts, responses, *, response_tokens, records, finished)` that passes on only the arguments that
        the function takes, which its attribute `columns` lists. Its attribute `description` identifies the function,
        its constant arguments and the contents of its file.

    Raises:
        ConfigError: (a ValueError) one line with the key, its value and the fix, if the target is
            malformed, cannot be found or imported, is not a function, or cannot be called with these arguments.
    """
    source = _Source(key, target)
    function = _resolve(source)
    constants = _plain_dict(source, kwargs)
    columns = _accepted_columns(source, function, constants)

    def reward_function(prompts, responses, **available):
        return function(prompts, responses, **{name: available[name] for name in columns}, **constants)

    reward_function.columns = tuple(columns)
    reward_function.description = f"{target} {constants} {_digest_of_file(function)}"
    return reward_function


def _digest_of_file(function: Callable) -> str | None:
    """SHA-256 of the file that defines the function, if there is one."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object, or a built-in
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file is not None and Path(file).is_file() else None


def _resolve(source: _Source) -> Callable:
    target = source.target
    remedy = 'write "package.module.function" or "path/to/file.py:function"'
    if not isinstance(target, str):
        raise source.error("is not a string", remedy)
    path, is_file, name = target.rpartition(":")
    if not is_file:
        path, _, name = target.rpartition(".")
    well_formed = path.endswith(".py") if is_file else all(part.isidentifier() for part in path.split("."))
    if not well_formed or not name.isidentifier() or target.endswith(".py"):
        raise source.error("names no function", remedy)

    module = _import_file(source, Path(path).expanduser()) if is_file else _import_module(source, path)
    if not hasattr(module, name):
        raise source.error(f"{path} has no attribute {name!r}", "correct the function's name")
    function = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        found = "class" if inspect.isclass(function) else type(function).__name__
        raise source.error(f"is a {found}, which cannot score responses", "name a function")
    return function


def _import_module(source: _Source, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            remedy = "install it, put its folder on PYTHONPATH, or name the file as path/to/file.py:function"
            raise source.error(f"there is no module {missing!r}", remedy) from error
        raise _import_failure(source, name, error) from error


def _import_file(source: _Source, file: Path) -> ModuleType:
    if not file.is_file():
        raise source.error(f"there is no file {file.resolve()}", "correct the path")
    try:
        return _execute_file(file.resolve())
    except (Exception, SystemExit) as error:
        raise _import_failure(source, str(file), error) from error


@functools.cache
def _execute_file(file: Path) -> ModuleType:
    """Execute the file once per process, like an import: the check before the run and the run itself both need it."""
    spec = importlib.util.spec_from_file_location(f"rs_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up a class's module there
    spec.loader.exec_module(module)
    return module


def _import_failure(source: _Source, name: str, error: Exception) -> ConfigError:
    return source.error(f"importing {name} raised {type(error).__name__}: {error}", "mend that module")


def _plain_dict(source: _Source, kwargs: Mapping | None) -> dict:
    if OmegaConf.is_config(kwargs):
        kwargs = OmegaConf.to_container(kwargs, resolve=True)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise source.error(f"{source.key}.kwargs is {kwargs!r}", "give a mapping of argument names to values")
    return dict(kwargs)


def _accepted_columns(source: _Source, function: Callable, constants: dict) -> list[str]:
    """Which of `OPTIONAL_COLUMNS` the function takes. Raises `ConfigError` if it cannot be called at all."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise source.error("its arguments cannot be inspected", "wrap it in a Python function") from error
    parameters = signature.parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_keyword = [name for name in by_keyword if name not in positional[:2]]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    taken = [name for name in constants if name in OPTIONAL_COLUMNS]
    if taken:
        raise source.error(
            f"{source.key}.kwargs sets {taken}, which the trainer passes itself", "remove them from kwargs"
        )
    unknown = [name for name in constants if name not in by_keyword]
    if unknown and not takes_any:
        free = [name for name in by_keyword if name not in OPTIONAL_COLUMNS]
        raise source.error(f"{source.key}.kwargs sets {unknown}, which the function does not take", f"it takes {free}")
    columns = [name for name in OPTIONAL_COLUMNS if takes_any or name in by_keyword]
    try:
        signature.bind([], [], **dict.fromkeys(columns), **constants)
    except TypeError as error:
        raise source.error(
            f"it cannot be called with (prompts, responses) and the keywords {[*columns, *constants]}: {error}",
            f"two arguments are filled by position; set others in {source.key}.kwargs or name {OPTIONAL_COLUMNS}",
        ) from error
    return columns


def score(
    function: Callable,
    prompts: list[str],
    responses: list[str],
    *,
    response_tokens: list[list[int]],
    records: list[dict],
    finished: list[bool],
) -> torch.Tensor:
    """Call a loaded reward function and check what it returns.

    All arguments have B entries. `function` takes them as described in `load_reward_function`.

    Returns:
        [B] float32 on the CPU; NaN means, and only means, that the function could not judge a response (`None`).
        The function is not called for an empty batch.

    Raises:
        RewardError: one line naming the prompt, chained to the exception if the function raised one. After an exception
            the rows are retried one by one to name the first that fails.
    """
    if not prompts:
        return torch.empty(0)
    columns = {"response_tokens": response_tokens, "records": records, "finished": finished}
    columns = {name: columns[name] for name in getattr(function, "columns", columns)}
    try:
        values = _call(function, prompts, responses, columns)
    except (Exception, SystemExit) as error:
        problem = one_line(f"the reward function raised {type(error).__name__}: {error}")
        row = _first_failing_row(function, prompts, responses, columns)
        where = _of_batch(prompts, records) if row is None else _for_row(row, prompts, records)
        raise RewardError(problem + where) from error

    if isinstance(values, (torch.Tensor, np.ndarray)) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        what = f"shape {tuple(values.shape)}" if hasattr(values, "shape") else f"a {type(values).__name__}"
        wanted = f"a list, or a 1-D tensor or array, of {len(prompts)} numbers"
        raise RewardError(f"the reward function returned {what} instead of {wanted}" + _of_batch(prompts, records))
    if len(values) != len(prompts):
        count = f"the reward function returned {len(values)} rewards for {len(prompts)} responses"
        raise RewardError(count + _of_batch(prompts, records))

    rewards = torch.empty(len(values))
    for row, value in enumerate(values):
        try:
            rewards[row] = _as_float(value)
        except ValueError as error:
            raise RewardError(f"the reward function returned {error}" + _for_row(row, prompts, records)) from None
    return rewards


def _call(function: Callable, prompts: list, responses: list, columns: dict[str, list]):
    """Call with copies, because the batch is used again: in messages, in the log, by the next reward."""
    with torch.no_grad():
        return function(*copy.deepcopy((prompts, responses)), **copy.deepcopy(columns))


def _as_float(value) -> float:
    """One returned reward as a number that float32 can hold, NaN for None; otherwise a ValueError describing it."""
    if value is None:
        return float("nan")
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{one_line(repr(value), limit=80)}, which is not a number,")
    if not abs(value) <= FLOAT32_MAX:  # also true of NaN
        raise ValueError(f"{one_line(repr(value), limit=80)}, which is not a finite float32,")
    return float(value)


def _first_failing_row(function: Callable, prompts: list, responses: list, columns: dict[str, list]) -> int | None:
    for row in range(len(prompts)):
        one = slice(row, row + 1)
        try:
            _call(function, prompts[one], responses[one], {name: column[one] for name, column in columns.items()})
        except (Exception, SystemExit):
            return row
    return None


def _for_row(row: int, prompts: list[str], records: list[dict]) -> str:
    return f" for {_name_row(row, prompts, records)}"


def _of_batch(prompts: list[str], records: list[dict]) -> str:
    return f"; the batch begins with {_name_row(0, prompts, records)}"


def _name_row(row: int, prompts: list[str], records: list[dict]) -> str:
    fields = {name: value for name, value in records[row].items() if name != "text"}
    record = f", record {one_line(repr(fields), limit=120)}" if fields else ""
    return f"row {row} of {len(prompts)}, prompt {one_line(prompts[row], limit=80)!r}{record}"


def decode_rollouts(rollout_batch: Mapping, tokenizer, end_strings: Sequence[str] = ()) -> dict[str, list]:
    """Decode rollouts to the inputs of a reward function.

    Args:
        rollout_batch: CPU tensors `response_tokens` [B, S] int64 (prompt, response, padding), `response_lengths` and
            `prompt_lengths` [B] (both count from the first prompt token), optionally `is_end` [B] bool; without it, a
            row is finished if its last token is the end-of-document id. Optionally `records`, B dicts; see
            `prompt_text`.
        tokenizer: has `eos_id` and `ids_to_text`.
        end_strings: stripped from the text of a finished response that ends in one of them.

    Returns:
        `prompts`, `responses` (texts; responses without special tokens, finished ones without their ending),
        `response_tokens` (ids, including the ending) and `finished`; lists of B entries.
    """
    rows = rollout_batch["response_tokens"].tolist()
    prompt_lengths, ends = rollout_batch["prompt_lengths"].tolist(), rollout_batch["response_lengths"].tolist()
    prompt_ids = [row[:start] for row, start in zip(rows, prompt_lengths, strict=True)]
    response_ids = [row[start:end] for row, start, end in zip(rows, prompt_lengths, ends, strict=True)]
    if "is_end" in rollout_batch:
        finished = [bool(flag) for flag in rollout_batch["is_end"].tolist()]
    else:
        finished = [ids[-1:] == [tokenizer.eos_id] for ids in response_ids]

    records = rollout_batch.get("records", [{}] * len(rows))
    return {
        "prompts": [prompt_text(record, ids, tokenizer) for record, ids in zip(records, prompt_ids, strict=True)],
        "responses": [
            _response_text(ids, is_finished, tokenizer, end_strings)
            for ids, is_finished in zip(response_ids, finished, strict=True)
        ],
        "response_tokens": response_ids,
        "finished": finished,
    }


def prompt_text(record: dict, ids: list[int], tokenizer) -> str:
    """The prompt as in its file, including special tokens; if `record` has no text, its decoded ids."""
    text = record.get("text")
    return text if isinstance(text, str) else tokenizer.ids_to_text(ids)


def _response_text(ids: list[int], is_finished: bool, tokenizer, end_strings: Sequence[str]) -> str:
    if is_finished and ids[-1:] == [tokenizer.eos_id]:
        return tokenizer.ids_to_text(ids[:-1])
    text = tokenizer.ids_to_text(ids)
    if is_finished:
        endings = [string for string in end_strings if string and text.endswith(string)]
        text = text.removesuffix(max(endings, key=len, default=""))
    return text


class PythonRewardModel:
    """Scores rollouts with a Python function; replaces `RemoteGPTRMClient` as `rm` of `RSTrainer`."""

    def __init__(self, function: Callable, tokenizer, end_strings: Sequence[str] = ()):
        """
        Args:
            function: from `load_reward_function`.
            tokenizer: the policy's; see `decode_rollouts`, also for `end_strings`.
        """
        self._function = function
        self.description = getattr(function, "description", None)
        self._tokenizer = tokenizer
        self._end_strings = tuple(end_strings)
        # The current GPU is per thread: without this, all processes of a node would score on GPU 0.
        self._executor = ThreadPoolExecutor(
            1, "reward", initializer=torch.cuda.set_device, initargs=(current_device(),)
        )

    def infer_rm(self, rollout_batch: Mapping) -> "PythonRewardFuture":
        """Start scoring and return at once. Local; every rank of a replica calls it with the same rollouts.

        `rollout_batch` is as for `decode_rollouts`, on any device, plus `records`, a list of B dicts. Errors in it are
        raised by `result()`: raised here, they would stop only the source rank.
        """
        if not is_replica_source():
            return PythonRewardFuture(None)
        batch = {key: _host_copy(rollout_batch[key]) for key in ROLLOUT_KEYS if key in rollout_batch}
        return PythonRewardFuture(self._executor.submit(self._score_rollouts, batch))

    def close(self) -> None:
        """Stop the background thread after its current call; pending calls are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _score_rollouts(self, batch: dict) -> torch.Tensor:
        rollouts = decode_rollouts(batch, self._tokenizer, self._end_strings)
        return score(self._function, records=batch["records"], **rollouts)


def _host_copy(value):
    """A copy that the background thread can read while the trainer modifies its own tensors."""
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


class PythonRewardFuture(BackgroundResult):
    """Rewards in flight; the future's result is float32 [B]."""

    def result(self) -> torch.Tensor:
        """Wait for the rewards. Collective over the replica, in the order of the `infer_rm` calls.

        Returns:
            float32 [B, 1] on this process's device, equal on all ranks of the replica; NaN: could not be judged.

        Raises:
            RewardError: on every rank of the replica, with the same message.
        """
        return share_from_source(lambda: self.future.result()).unsqueeze(-1).to(current_device())
