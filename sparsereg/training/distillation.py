"""Distillation: a trained network teaches the one that is trained.

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsereg.data.batches import call
from sparsereg.data.form import Inputs


class Distillation:
    """Mixes cross-entropy with the divergence from a teacher's softened answers.

    It is no nn.Module, so that the teacher is neither trained nor saved with the pupil.

    Args:
        teacher: of the same task; put into eval mode.
        weight: of the divergence, in [0, 1]; cross-entropy gets the rest.
        temperature: by which both networks' logits are divided, > 0.
        unchanging: gives batches of all images that training shows again and again as they are, always in the
            same order, since how an answer is rounded can depend on its neighbours. On a CPU the teacher is
            asked once for each of them. None: it is asked in every step.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        unchanging: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature
        self._unchanging = unchanging
        self._kept: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def answer(self, inputs: Inputs) -> Any:
        """Return what the teacher answers to a batch as the pupil saw it."""
        kept = self._kept_for(inputs)
        if kept is not None:
            return kept
        device = next(iter(inputs.values())).device if isinstance(inputs, Mapping) else inputs.device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        return call(self.teacher, inputs)

    def _kept_for(self, inputs: Inputs) -> Tensor | None:
        """The answers that are kept for a batch; None if there are not all of them."""
        if not isinstance(inputs, Tensor) or inputs.device.type != "cpu":
            return None
        self._ask_once()
        if not self._kept:
            return None
        found = [self._kept.get(key) for key in _keys(inputs)]
        known = [answer for answer in found if answer is not None]
        return torch.stack(known) if len(known) == len(found) else None

    def _ask_once(self) -> None:
        """Keep the answers to all images that are said to come again as they are."""
        batches, self._unchanging = self._unchanging, None
        for batch in () if batches is None else batches():
            answers = call(self.teacher, batch)
            if isinstance(answers, Tensor):
                self._kept.update(zip(_keys(batch), answers.unbind(), strict=True))

    def mixed(self, loss: Tensor, logits: Tensor, taught: Tensor) -> Tensor:
        """Return (1 - weight) loss + weight T^2 KL(teacher || pupil), a scalar.

        The divergence is the mean over all predictions, of each pixel or token where there are several.

        Args:
            loss: the pupil's on the labels, a scalar.
            logits: the pupil's, (examples, classes, ...).
            taught: the teacher's, likewise.
        """
        taught = F.log_softmax(taught.float() / self.temperature, dim=1)
        learned = F.log_softmax(logits.float() / self.temperature, dim=1)
        num_predictions = logits.numel() / logits.shape[1]
        divergence = F.kl_div(learned, taught, reduction="sum", log_target=True) / num_predictions
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def _keys(images: Tensor) -> list[bytes]:
    """Name each image by its content."""
    content = images.contiguous().view(torch.uint8).numpy()  # NumPy has no bfloat16
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in content]
