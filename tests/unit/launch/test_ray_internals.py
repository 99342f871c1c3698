"""Ray's private names in `ray_internals` still exist and have the expected meaning."""

import dataclasses
import inspect

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.worker_group import worker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from recsys.launch import ray_internals


def test_the_trainer_still_hands_its_failure_policy_to_the_method_that_is_overridden() -> None:
    assert "_initialize_and_run_controller" in vars(DataParallelTrainer)
    assert "self._initialize_and_run_controller(" in inspect.getsource(DataParallelTrainer.fit)
    assert "failure_policy=" in inspect.getsource(DataParallelTrainer.fit)


@pytest.mark.parametrize("answer", [True, False])
def test_the_policy_follows_what_it_is_given(answer: bool) -> None:
    error = WorkerGroupError("lost", {0: RuntimeError("x")})
    policy = ray_internals.RestartPolicy(FailureConfig(), lambda failed: answer if failed is error else not answer)
    assert policy.make_decision(error) == (FailureDecision.RETRY if answer else FailureDecision.RAISE)


def test_what_is_read_of_the_train_context_is_there() -> None:
    assert "preemption_context" in {field.name for field in dataclasses.fields(TrainContext)}
    assert PreemptionContext().preemption_info is None


def test_workers_have_the_class_name_that_they_are_found_by() -> None:
    assert hasattr(worker, ray_internals.WORKER_CLASS)
