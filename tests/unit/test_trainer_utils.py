from types import SimpleNamespace

import pytest
from nemo.utils import logging

from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper
from nemo_aligner.utils.trainer_utils import (
    check_progress,
    compute_limit_batches,
    compute_num_steps_per_epoch,
    safe_is_divisible,
)


@pytest.mark.parametrize(
    ("number", "limit", "expected"),
    [(10, None, 10), (10, 1.0, 10), (10, 0.59, 5), (10, 0.0, 0), (10, 3, 3), (10, 99, 10), (10, 0, 0), (0, 0.5, 0)],
)
def test_compute_limit_batches(number, limit, expected):
    assert compute_limit_batches(number, limit) == expected


def test_compute_limit_batches_refuses_other_types():
    with pytest.raises(TypeError, match="'all'"):
        compute_limit_batches(10, "all")


@pytest.mark.parametrize(
    ("total", "gbs", "limit", "expected"),
    [
        (17, 4, 1.0, 4),  # 17 // 4
        (16, 4, 1.0, 4),
        (3, 4, 1.0, 0),
        (40, 4, None, 10),
        (40, 4, 2.5, 10),  # a float above 1 is not a fraction
        (40, 4, 0.25, 2),  # 2.5 truncated
        (40, 4, 3, 3),
        (40, 4, 0, 0),
        (40, 4, -1, 10),
        (40, 4, -0.5, 10),
    ],
)
def test_compute_num_steps_per_epoch(total, gbs, limit, expected):
    sampler = SimpleNamespace(total_samples=total, global_batch_size=gbs, drop_last=True)
    assert compute_num_steps_per_epoch(sampler, limit) == expected


def test_num_steps_needs_drop_last():
    with pytest.raises(NotImplementedError, match="drop_last=False"):
        compute_num_steps_per_epoch(SimpleNamespace(total_samples=8, global_batch_size=4, drop_last=False))


def test_num_steps_refuses_a_limit_of_another_type():
    sampler = SimpleNamespace(total_samples=8, global_batch_size=4, drop_last=True)
    with pytest.raises(TypeError, match="'all'"):
        compute_num_steps_per_epoch(sampler, "all")


@pytest.mark.parametrize(
    ("step", "val_interval", "save_interval", "limit_val", "timed_out", "expected"),
    [
        (1, 2, 4, 1.0, False, (False, False, False)),
        (2, 2, 4, 1.0, False, (True, False, False)),
        (4, 2, 4, 1.0, False, (True, True, False)),
        (9, 2, 4, 1.0, False, (True, True, True)),  # the last step, at no interval
        (1, 2, 4, 1.0, True, (True, True, False)),  # out of time
        (4, 0, 4, 1.0, False, (False, True, False)),  # no validation
        (4, -1, 4, 1.0, False, (False, True, False)),
        (4, 2, 4, 0, False, (False, True, False)),
        (4, 2, 4, 0.0, False, (False, True, False)),
        (9, 0, 0, 1.0, True, (False, False, True)),  # nothing is enabled, whatever the reason
        (4, 2, 0, 1.0, False, (True, False, False)),  # any validation interval goes with a save interval of 0
        (3, 0, 3, 1.0, False, (False, True, False)),  # without validation, any save interval is allowed
        (3, 2, 3, 0, False, (False, True, False)),
    ],
)
def test_check_progress(step, val_interval, save_interval, limit_val, timed_out, expected):
    assert check_progress(step, 9, val_interval, save_interval, limit_val, timed_out) == expected


def test_save_interval_must_be_a_multiple_of_the_validation_interval():
    with pytest.raises(AssertionError, match=r"save_interval=3 .* val_check_interval=2"):
        check_progress(1, 9, 2, 3, 1.0)


@pytest.mark.parametrize(("a", "b", "expected"), [(6, 3, True), (7, 3, False), (0, 3, True), (6, 0, False)])
def test_safe_is_divisible(a, b, expected):
    assert safe_is_divisible(a, b) is expected


def test_a_logger_that_cannot_write_does_not_end_the_run(monkeypatch):
    warnings, logged = [], []
    monkeypatch.setattr(logging, "warning", warnings.append)

    class Full:
        def log_metrics(self, metrics, step):
            raise OSError(28, "No space left on device")

    class Working:
        def log_metrics(self, metrics, step):
            logged.append((metrics, step))

    CustomLoggerWrapper([Full(), Working()]).log_metrics({"loss": 1.0}, step=3, prefix="train_optim/")
    assert logged == [({"train_optim/loss": 1.0}, 3)]
    assert warnings == ["Full.log_metrics: [Errno 28] No space left on device"]
