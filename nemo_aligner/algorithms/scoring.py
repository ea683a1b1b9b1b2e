"""Rewards of rollouts: requested while the next ones are generated, then awaited by all ranks together."""

from collections.abc import Callable

from nemo_aligner.algorithms.rollout_metrics import PART_PREFIX
from nemo_aligner.utils.server_utils import fail_on_all_ranks

# While one replica waits for rewards, all ranks synchronize this often: their process groups give up on a rank that
# stays away from a collective for some minutes, and schedulers on a job that does not end soon when asked to.
SYNC_INTERVAL_S = 5.0


def request_rewards(rm, rollouts: dict, records: list[dict]):
    """Request a micro-batch's rewards; returns their future, or None if an earlier start left them.

    Args:
        records: of each row; see `records_of`.
    """
    if "rewards" in rollouts:
        return None
    return rm.infer_rm({**rollouts, "records": records})


def add_rewards_(rollouts: dict, future, sync: Callable[[bool], bool]) -> None:
    """Wait for a micro-batch's `rewards` [rows], with the parts of a weighted sum, and add them to `rollouts`.

    Rows without a reward are no longer fit for training. Collective over the job also without a future: one replica may
    have scored rollouts from an earlier start where another has none.

    Args:
        sync: see `wait_on_all_ranks`.

    Raises:
        RewardError: on every rank of the job.
    """
    wait_on_all_ranks(sync, future)
    rewards = fail_on_all_ranks(lambda: None if future is None else future.result())
    if future is None:
        return
    parts = {f"{PART_PREFIX}{name}": part for name, part in getattr(future, "parts", {}).items()}
    for name, part in {"rewards": rewards, **parts}.items():
        rollouts[name] = part.flatten().to(rollouts["response_tokens"].device)
    rollouts["is_fit"] &= ~rollouts["rewards"].isnan()


def wait_on_all_ranks(sync: Callable[[bool], bool], future=None) -> None:
    """Return when every replica has its reward, or the failure. Futures without a `wait` method block in `result()`.

    Without a future: return when every replica has come here, however often it has synchronized on the way.

    Args:
        sync: takes whether this rank is done, and returns whether all are. Collective over the job.
    """
    wait = getattr(future, "wait", lambda timeout_s: True)
    while not sync(wait(SYNC_INTERVAL_S)):
        pass


def records_of(dataset, batch: dict, num_rows: int) -> list[dict]:
    """Each row's line of the prompt file; rollouts of a prompt share one. Foreign datasets have none: empty dicts.

    Args:
        batch: collated prompts of `dataset`, which neighbouring rows answer.
    """
    if "prompt_index" not in batch or not hasattr(dataset, "record"):
        return [{}] * num_rows
    records = [dataset.record(index) for index in batch["prompt_index"].tolist()]
    return [record for record in records for _ in range(num_rows // len(records))]
