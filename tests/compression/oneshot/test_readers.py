"""Rows of a layer: what it reads, times its weights, is what it gives, in any order of places and outputs."""

import pytest
import torch
from torch import nn

from sparsereg.compression import compact
from sparsereg.compression.oneshot.readers import readers
from sparsereg.compression.walk import Route

LAYERS = {
    "linear": lambda: (nn.Linear(6, 8), (5, 6)),
    "tokens": lambda: (nn.Linear(6, 8), (5, 7, 6)),
    "a map": lambda: (nn.Conv2d(6, 8, 3, stride=2, padding=1), (5, 6, 9, 8)),
    "by its edge": lambda: (nn.Conv2d(6, 8, (3, 1), padding="same", padding_mode="reflect"), (5, 6, 7, 8)),
    "groups": lambda: (nn.Conv2d(6, 8, 3, groups=2), (5, 6, 9, 8)),
    "a series": lambda: (nn.Conv1d(6, 8, 3, dilation=2), (5, 6, 9)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("most", [1000, 11])
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_times_weights_are_outputs(name, most, layout):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    x = torch.randn(shape)
    small = compact(nn.Sequential(layer).eval(), x[:1])
    (reader,) = readers(small)
    walk = Route(small).start(x.to(memory_format=layout) if x.dim() == 4 else x)
    read, given = walk.before(reader.node, reader.source), walk.after(reader.node)
    chosen, example = reader.draw(read, given, most, torch.Generator().manual_seed(0))
    assert len(chosen) == min(most, reader.places(read, given))
    chosen, columns = chosen.flip(0), torch.randperm(8)
    weight = reader.matrix(small.get_parameter(reader.weight))
    bias = small.get_parameter(reader.bias).double().view(reader.groups, 1, -1)
    inputs = reader.inputs(read, given, chosen, constant=True)
    made = (inputs @ torch.cat([weight, bias], 1)).transpose(0, 1).flatten(1)[:, columns]
    outputs = reader.outputs(given, chosen, columns).transpose(0, 1).flatten(1)
    torch.testing.assert_close(made, outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[:, :, :-1], reader.inputs(read, given, chosen), rtol=0, atol=0)
    own = given.movedim(1, -1) if reader.layer is not None else given
    for row, place in zip(example.flip(0), outputs, strict=True):
        assert (own[row].reshape(-1, 8)[:, columns] == place).all(1).any()
