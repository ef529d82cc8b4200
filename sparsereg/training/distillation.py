"""Distillation: a trained network teaches the one that is trained.

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation:
    """Mixes cross-entropy with the divergence from a teacher's softened answers.

    It is no nn.Module, so that the teacher is neither trained nor saved with the pupil.

    Args:
        teacher: images to logits; put into eval mode.
        weight: of the divergence, in [0, 1]; cross-entropy gets the rest.
        temperature: by which both networks' logits are divided, > 0.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature

    def mixed(self, loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """Return (1 - weight) loss + weight T^2 KL(teacher || pupil), a scalar.

        Args:
            loss: the pupil's on the labels, a scalar.
            images: the batch as the pupil saw it.
            logits: the pupil's, (batch, classes).
        """
        with torch.no_grad():
            if next(self.teacher.parameters()).device != images.device:
                self.teacher.to(images.device)
            taught = F.log_softmax(self.teacher(images).float() / self.temperature, dim=1)
        learned = F.log_softmax(logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(learned, taught, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence
