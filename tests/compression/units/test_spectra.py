"""Fourier transforms and complex numbers: what goes with its units, and that what is left is exact."""

import torch
from torch import nn

import sparsereg
from sparsereg.compression import load_compacted, save_compacted
from sparsereg.penalties import hard_concretes
from tests.compression.units.test_rules import free, halved


class Filters(nn.Module):
    """A filter for each channel among frequencies, as of global filter networks and operators."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.filters = nn.Parameter(torch.randn(4, 3, 12, 2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        y = torch.fft.rfft2(self.norm(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filters)
        y = torch.fft.irfft2(y, s=(4, 4), dim=(1, 2), norm="ortho")
        return self.head((x + y).mean((1, 2)))


class Mixing(nn.Module):
    """Transforms over units, as of FNet, which mix them."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.fft.fft(torch.fft.fft(self.first(x)), dim=1).real)))


class Turned(nn.Module):
    """Complex numbers put together of two layers, and turned by angles of their own."""

    def __init__(self):
        super().__init__()
        self.real, self.imag = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.angles, self.head = nn.Parameter(torch.randn(10)), nn.Linear(20, 3)

    def forward(self, x):
        z = torch.complex(self.real(x), self.imag(x))
        z = 2j * z.conj() * torch.polar(torch.ones_like(self.angles), self.angles)
        pairs = torch.view_as_real(z)
        return self.head(torch.cat([pairs[..., 0], z.imag], -1))


class Operator(nn.Module):
    """A matrix of complex numbers for each low frequency, as of Fourier neural operators."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.last = nn.Linear(2, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.cfloat))

    def forward(self, x):
        x = self.first(x).transpose(1, 2)
        low = torch.fft.rfft(x)
        low = nn.functional.pad(torch.einsum("bix,iox->box", low[..., :3], self.weight), (0, 4))
        x = torch.relu(torch.fft.irfft(low, n=x.shape[-1]) + self.beside(x))
        return self.last(x.transpose(1, 2))


class OnMaps(nn.Module):
    """Products with low frequencies, written into zeros for all of them, along two axes of a map."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.last = (nn.Conv2d(a, b, 1) for a, b in ((2, 8), (8, 8), (8, 1)))
        self.low, self.high = (nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.cdouble)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        all_ = torch.fft.rfft2(x)
        y = torch.zeros(len(x), 8, x.shape[-2], x.shape[-1] // 2 + 1, dtype=all_.dtype, device=x.device)
        y[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", all_[:, :, :3, :3], self.low)
        y[:, :, -3:, :3] = torch.einsum("bixy,ioxy->boxy", all_[:, :, -3:, :3], self.high)
        return self.last(torch.relu(torch.fft.irfft2(y, s=x.shape[-2:]) + self.beside(x)))


def test_operators_on_maps_that_write_their_frequencies_into_zeros():
    torch.manual_seed(0)
    network, x = OnMaps().double(), torch.randn(2, 2, 8, 8).double()
    assert free(network, x) == {("low", 0): 8, ("low", 1): 8}
    assert halved(network, x) < 1e-12


def test_transforms_along_other_axes_leave_units_what_they_are():
    assert list(free(Filters(), torch.randn(2, 3, 16, 16)).values()) == [12]
    assert halved(Filters(), torch.randn(2, 3, 16, 16)) < 1e-9


def test_transforms_along_units_keep_them_and_are_named():
    explained = sparsereg.explain(Mixing(), torch.randn(2, 5, 6))
    assert "fft_fft runs along it" in str(explained)
    assert free(Mixing(), torch.randn(2, 5, 6)) == {("up.weight", 0): 12}
    assert halved(Mixing(), torch.randn(2, 5, 6)) < 1e-9


def test_both_parts_of_complex_numbers_go_together_and_can_be_saved(tmp_path):
    x = torch.randn(4, 6)
    assert list(free(Turned(), x).values()) == [10]
    assert halved(Turned(), x) < 1e-9
    gated = sparsereg.gate(Turned(), x).eval()
    with torch.no_grad():
        next(m for m in gated.modules() if isinstance(m, sparsereg.HardConcrete)).log_alpha[:4] = -10
    smaller = sparsereg.compact(gated, x)
    save_compacted(smaller, tmp_path / "compacted.pt")
    assert torch.equal(load_compacted(tmp_path / "compacted.pt")(x), smaller(x))
    torch.testing.assert_close(smaller(x), gated(x))
    assert smaller.real.out_features == 6


def test_complex_weights_lose_units_and_are_compared_in_full_precision():
    x = torch.randn(2, 12, 2)
    assert sorted(free(Operator(), x).values()) == [8, 8]
    gated = sparsereg.gate(Operator(), x).eval()
    with torch.no_grad():
        for gates in (m for m in gated.modules() if isinstance(m, sparsereg.HardConcrete)):
            gates.log_alpha[:4] = -10
    smaller = sparsereg.compact(gated, x)
    assert smaller.weight.shape == (4, 4, 3)
    smaller(x).sum().backward()
    assert smaller.weight.grad is not None


class Written(nn.Module):
    """Frequencies that are filtered and written among zeros, as Fourier neural operators do it."""

    def __init__(self):
        super().__init__()
        self.lift, self.skip, self.head = nn.Linear(3, 12), nn.Conv1d(12, 12, 1), nn.Linear(12, 2)
        self.filters = nn.Parameter(torch.randn(12, 12, 4, 2))

    def forward(self, x):
        x = self.lift(x).transpose(1, 2)
        found, made = torch.fft.rfft(x), torch.zeros(len(x), 12, x.shape[-1] // 2 + 1, dtype=torch.complex128)
        made[:, :, 1:5] = torch.einsum("bim,iom->bom", found[:, :, :4], torch.view_as_complex(self.filters))
        x = torch.tanh(torch.fft.irfft(made, n=x.shape[-1]) + self.skip(x))
        return self.head(x.transpose(1, 2))


def test_frequencies_that_are_written_among_zeros_have_gradients():
    example = torch.randn(2, 10, 3, dtype=torch.float64)
    network = sparsereg.gate(Written().double(), example).eval()
    for gates in hard_concretes(network).values():
        gates.log_alpha.data[::2] = -10
    smaller = sparsereg.compact(network, example)
    assert (smaller(example) - network(example)).abs().max() < 1e-12
    smaller.train()(example).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())
