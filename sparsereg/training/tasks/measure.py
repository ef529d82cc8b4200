"""The figures of a task, of whatever answers: a network, or a file in a runtime."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from sparsereg.training.results import as_written
from sparsereg.training.tasks.task import Task


@torch.inference_mode()
def measure(
    answer: Callable[[Any], Any], task: Task, batches: Iterable[Any], device: torch.device
) -> dict[str, float]:
    """Return the figures of a task.

    Args:
        answer: from inputs to what a network in eval mode answers.
        task: that tells what is measured.
        batches: of test examples, on any device.
        device: where inputs and answers are.
    """
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    for batch in batches:
        inputs, labels = task.split(move_data_to_device(batch, device))
        predictions, labels = task.predictions(answer(inputs), labels)
        for metric in metrics.values():
            metric.update(predictions, labels)
    return {name: as_written(metric.compute()) for name, metric in metrics.items()}
