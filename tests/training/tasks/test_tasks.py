"""Losses and figures of the tasks against hand-made values."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from sparsereg.data import batches, form
from sparsereg.data.batches import inputs_and_labels, tensor_of
from sparsereg.data.form import Form
from sparsereg.errors import InputError
from sparsereg.training.tasks import language_model, registry, task
from sparsereg.training.tasks.config import CONFIGS
from sparsereg.training.tasks.language_model import IGNORED, LanguageModel, MeanBits
from sparsereg.training.tasks.segmentation import Segmentation

TEXT = Form(256, (6,), "language_model", 256)


@pytest.mark.parametrize("module", [batches, form, language_model, task], ids=lambda m: m.__name__)
def test_examples_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", registry.TASKS)
def test_settings_know_the_figures_of_each_task(name):
    made = registry.build(CONFIGS[name](), Form(256, (6,), name, 256))
    assert made.figures == CONFIGS[name].FIGURES
    assert made.name == name
    assert made.smooths
    assert made.larger_is_better == (name != "language_model")


def test_bits_per_byte():
    made = LanguageModel(TEXT)
    logits = torch.randn(2, 6, 256)
    labels = torch.randint(256, (2, 6))
    labels[0, 4:] = IGNORED
    predictions, places = made.predictions(logits, labels)
    metric = made.metrics()["bits_per_byte"]
    metric.update(predictions[:5], places[:5])
    metric.update(predictions[5:], places[5:])
    counted = labels != IGNORED
    nats = -logits.double().log_softmax(2).gather(2, labels.clamp(min=0)[..., None])[..., 0][counted]
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-6)
    assert float(made.loss(predictions, places)) == pytest.approx(float(nats.mean()), rel=1e-6)
    assert float(made.loss(predictions, torch.full_like(places, IGNORED))) == 0.0


def test_tokens_that_are_no_bytes_have_their_own_unit():
    tokens = Form(1000, (6,), "language_model", 1000)
    assert LanguageModel(tokens).figures[0] == "bits_per_token"
    made = LanguageModel(tokens, bytes_per_token=4.0)
    assert made.figures[0] == "bits_per_byte"
    metric = made.metrics()["bits_per_byte"]
    metric.update(torch.zeros(3, 1000), torch.tensor([1, 2, 3]))
    assert float(metric.compute()) == pytest.approx(math.log2(1000) / 4, rel=1e-6)


def test_batches_of_a_language_model():
    made, tokens = LanguageModel(TEXT), torch.tensor([[5, 6, 7, 8]])
    pair = made.split((tokens[:, :-1], tokens[:, 1:]))
    alone = made.split(tokens)
    for inputs, labels in (pair, alone):
        assert inputs.tolist() == [[5, 6, 7]]
        assert labels.tolist() == [[6, 7, 8]]
    mask = torch.tensor([[1, 1, 1, 0]])
    inputs, labels = made.split({"input_ids": tokens, "attention_mask": mask})
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert labels.tolist() == [[6, 7, IGNORED, IGNORED]]
    inputs, labels = made.split({"input_ids": tokens, "labels": tokens})
    assert list(inputs) == ["input_ids"]
    assert labels.tolist() == [[6, 7, 8, IGNORED]]


def test_mean_iou_is_that_of_all_pixels_together():
    made = Segmentation(Form(4, (3, 4, 4), "segmentation"))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6, 4, 4), generator=generator, dtype=torch.uint8)  # no pixel has class 3
    labels[0, 0] = 255
    answers = torch.randint(3, (6, 4, 4), generator=generator)
    logits = F.one_hot(answers, 4).permute(0, 3, 1, 2).float()
    metrics = made.metrics()
    for part in (slice(0, 2), slice(2, 6)):
        predictions, masks = made.predictions({"out": logits[part]}, labels[part])
        for metric in metrics.values():
            metric.update(predictions, masks)
    counted = labels != 255
    ious = []
    for k in range(3):
        mine, theirs = (answers == k) & counted, (labels == k) & counted
        ious.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    assert float(metrics["mean_iou"].compute()) == pytest.approx(sum(ious) / 3, rel=1e-6)
    right = ((answers == labels.long()) & counted).sum() / counted.sum()
    assert float(metrics["acc"].compute()) == pytest.approx(float(right), rel=1e-6)
    predictions, masks = made.predictions(logits, labels)
    expected = F.cross_entropy(logits, labels.long(), ignore_index=255)
    assert torch.allclose(made.loss(predictions, masks), expected)


def test_a_coarser_answer_is_enlarged():
    made = Segmentation(Form(2, (3, 8, 8), "segmentation"))
    logits, labels = made.predictions(torch.randn(2, 2, 4, 4), torch.zeros(2, 1, 8, 8, dtype=torch.int64))
    assert logits.shape == (2, 2, 8, 8)
    assert labels.shape == (2, 8, 8)


def test_what_counts_of_an_answer():
    assert tensor_of({"aux": 1, "out": 2}) == 2
    assert tensor_of({"only": 3}) == 3
    with pytest.raises(TypeError, match="a dictionary of a, b"):
        tensor_of({"a": 1, "b": 2})
    with pytest.raises(TypeError, match="got a tuple of length 3"):
        inputs_and_labels((1, 2, 3))


def test_inputs_that_a_network_does_not_take_are_left_out():
    class Net(torch.nn.Module):
        def forward(self, pixel_values):
            return pixel_values

    given = Form(2, (3, 4, 4), inputs={"id": ("int64", ()), "pixel_values": ("float32", (3, 4, 4))})
    assert list(given.taken_by(Net()).example()) == ["pixel_values"]
    with pytest.raises(InputError, match="takes none: its arguments are pixel_values"):
        Form(2, (3,), inputs={"x": ("float32", (3,))}).taken_by(Net())


def test_mean_bits_of_nothing_is_no_number():
    with pytest.warns(UserWarning, match="before the"):
        assert math.isnan(float(MeanBits().compute()))
