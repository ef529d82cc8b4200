"""Answers with names: a smaller network, or one from a file, gives the kind that the network gives."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparsereg import compact, gate
from sparsereg.compression import load_compacted, save_compacted
from sparsereg.compression.deploy import export
from sparsereg.compression.named import Named, kind_of, named
from sparsereg.compression.storage import describe, rebuild
from sparsereg.errors import InputError
from sparsereg.penalties import hard_concretes

transformers = pytest.importorskip("transformers")


def halved(network, example):
    gated = gate(network.eval(), example).eval()
    for gates in hard_concretes(gated).values():
        gates.log_alpha.data[::2] = -10
    return gated, compact(gated, example)


def bert():
    config = transformers.BertConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    config.output_hidden_states = True
    return transformers.BertForSequenceClassification(config)


def test_models_of_transformers_answer_in_their_own_kind(tmp_path):
    example = {"input_ids": torch.randint(20, (2, 5))}
    gated, small = halved(bert(), example)
    again = load_compacted(save_compacted(small, tmp_path / "c.pt"))
    wanted = gated(**example)
    for network in (small, again, compact(again, example)):
        found = network(**example)
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert len(found.hidden_states) == 2
    for kind in ("onnx", "pt2"):
        assert export(small, example, tmp_path / f"c.{kind}").is_file()


@dataclass
class Own(transformers.utils.ModelOutput):
    logits: torch.Tensor | None = None


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return Own(logits=self.b(self.a(x).relu()))


def test_a_kind_of_ones_own_is_read_by_the_same_names(tmp_path):
    x = torch.randn(3, 4)
    gated, small = halved(Answers(), x)
    found = load_compacted(save_compacted(small, tmp_path / "c.pt"))(x)
    assert isinstance(found, Named)
    torch.testing.assert_close(found.logits, gated(x).logits)
    assert found[0] is found["logits"] is found.logits
    with pytest.raises(AttributeError, match="there is no answer 'loss'; there are logits"):
        _ = found.loss


@pytest.mark.parametrize(
    "kind",
    ["os.system", "transformers.pipeline", "transformers.models.a.b.C", "transformers.utils.logging"],
)
def test_a_file_names_no_other_class(kind):
    x = torch.randn(3, 4)
    small = halved(Answers(), x)[1]
    plan = describe(small).replace('{"tuple": ["", ', f'{{"tuple": ["{kind}", ')
    assert kind in plan
    with pytest.raises(InputError, match="no class of answers"):
        rebuild(plan, small.state_dict())


def test_a_class_that_is_no_kind_of_answers_is_none():
    assert isinstance(named("transformers.models.bert.modeling_bert.BertModel", {"a": 1}), Named)
    assert isinstance(named("transformers.models.nothing.modeling_nothing.Output", {"a": 1}), Named)
    assert kind_of(Own()) == ""


def test_answers_are_compared_by_their_names():
    class Turns(Answers):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            found = [("one", self.a(x).sum(-1)), ("two", self.b(self.a(x).relu()))]
            return dict(found if self.calls % 2 else found[::-1])

    x = torch.randn(3, 4)
    halved(Turns(), x)
