"""Tucker and CP decompositions against tensorly's own reconstructions, and what they do where they cannot work."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import nn

import workbench as wb
from workbench.techniques.low_rank import cp
from workbench.techniques.low_rank.cp import Terms, composed, cp_for, fit_outputs, largest_rank, singular_terms, swept
from workbench.techniques.low_rank.tucker import cut_core, tucker2

CONVOLUTIONS = [
    nn.Conv2d(12, 16, 3, stride=2, padding=1),
    nn.Conv2d(12, 16, (5, 3), padding="same", dilation=2, padding_mode="reflect", bias=False),
    nn.Conv1d(12, 16, 5, padding=2),
    nn.Conv3d(12, 16, 3, padding=(1, 0, 1)),
]
IMAGES = {nn.Conv1d: (2, 12, 21), nn.Conv2d: (2, 12, 13, 11), nn.Conv3d: (2, 12, 5, 6, 7)}


def kernel(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight, other):
    return float(((weight - other).norm() / weight.norm()).detach())


def whole_kernel(parts, weight):
    """Return the kernel that layers in a row make together, found by sending single pixels through them."""
    inputs, places = weight.shape[1], weight.shape[2:]
    size = [2 * k - 1 for k in places]
    pixels = torch.zeros(inputs, inputs, *size)
    for channel in range(inputs):
        pixels[(channel, channel, *[k - 1 for k in places])] = 1
    answer = parts(pixels)
    return answer.flip(tuple(range(2, answer.dim()))).transpose(0, 1)


@pytest.mark.parametrize("rank", [0.25, 0.5, 0.75])
def test_three_layers_make_the_kernel_that_tensorly_puts_together(rank):
    layer = nn.Conv2d(12, 16, 3, bias=False)
    parts = wb.Tucker(rank=rank).compress(nn.Sequential(layer))[0]
    down, core, up = (part.weight.detach() for part in parts)
    ours = tensorly.tucker_to_tensor(
        (core.numpy(), [up.flatten(1).numpy(), down.flatten(1).T.numpy(), np.eye(3), np.eye(3)])
    )
    assert torch.allclose(whole_kernel(parts, layer.weight), torch.from_numpy(ours).float(), atol=1e-5)
    assert [tuple(part.kernel_size) for part in parts] == [(1, 1), (3, 3), (1, 1)]
    assert core.shape == (round(16 * rank), round(12 * rank), 3, 3)


@pytest.mark.parametrize("rank", [0.25, 0.5, 0.75])
def test_one_decomposition_cut_is_nearly_as_good_as_tensorly_at_each_rank(rank):
    weight = kernel(16, 12, 3, 3) + 3 * torch.einsum("or,irhw->oihw", kernel(16, 4), kernel(12, 4, 3, 3, seed=1))
    up, core, down = cut_core(tucker2(weight), rank)
    ours = torch.einsum("or,rsjk,si->oijk", up, core, down)
    (best, factors), _ = partial_tucker(weight.numpy(), rank=list(core.shape[:2]), modes=[0, 1], n_iter_max=100)
    theirs = torch.from_numpy(tensorly.tenalg.multi_mode_dot(best, factors, modes=[0, 1]))
    assert error(weight, theirs) <= error(weight, ours) + 1e-6
    assert error(weight, ours) < 1.03 * error(weight, theirs)


def test_at_full_rank_tucker_loses_nothing():
    weight = kernel(16, 2, 3, 3)
    up, core, down = tucker2(weight)
    assert core.shape[:2] == (16, 2) and torch.allclose(
        torch.einsum("or,rsjk,si->oijk", up, core, down), weight.double()
    )


@pytest.mark.parametrize("technique", [wb.Tucker(rank=0.35), wb.CPDecomposition(rank=0.9, sweeps=60)], ids=str)
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_kernel_of_low_rank_computes_the_same(technique, layer):
    with torch.no_grad():  # three terms make a kernel of rank three for either
        terms = [kernel(size, 3, seed=i) for i, size in enumerate(layer.weight.shape)]
        layer.weight.copy_(composed(terms))
    x = kernel(*IMAGES[type(layer)])
    small = technique.compress(nn.Sequential(layer))
    assert isinstance(small[0], nn.Sequential)
    assert error(layer(x), small(x)) < 0.02


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("rank", [4, 16])
def test_cp_terms_after_sweeps_fit_as_well_as_those_of_tensorly(rank):
    weight = kernel(20, 12, 3, 3)
    terms = swept(weight, Terms(singular_terms(weight)).cut(rank), 40)
    theirs = parafac(weight.double().numpy(), rank, n_iter_max=40, tol=0, random_state=0)
    reference = torch.from_numpy(tensorly.cp_to_tensor(theirs)).float()
    assert torch.allclose(
        composed(terms), torch.from_numpy(tensorly.cp_to_tensor((None, [t.numpy() for t in terms]))), atol=1e-5
    )
    assert error(weight, composed(terms)) < 1.02 * error(weight, reference)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("name", ["features.1.0", "features.3.0"])
@pytest.mark.parametrize("part", [0.1, 0.5])
def test_terms_without_sweeps_are_nearly_as_good_as_ten_sweeps_of_tensorly_on_trained_weights(name, part):
    weight = wb.load_model("glyphs-cnn").get_submodule(name).weight.detach()
    rank = max(1, round(part * largest_rank(weight)))
    theirs = parafac(weight.numpy(), rank, n_iter_max=10, tol=0, random_state=0)
    reference = torch.from_numpy(tensorly.cp_to_tensor(theirs)).float()
    assert error(weight, composed(Terms(singular_terms(weight)).cut(rank))) < 1.1 * error(weight, reference)


@pytest.mark.parametrize("shape", [(6, 40, 3, 3), (4, 5, 7), (3, 4, 2, 2, 3)])
def test_terms_are_orthogonal_in_falling_order_and_all_of_them_make_the_kernel(shape, monkeypatch):
    monkeypatch.setattr(cp, "largest_rank", lambda weight: weight.numel())
    weight = kernel(*shape)
    terms = singular_terms(weight)
    assert torch.allclose(composed(terms).float(), weight, atol=1e-5)
    size = (terms[0].norm(dim=0)).numpy()
    assert (np.diff(size) <= 1e-12).all()
    flat = cp.products(terms)
    assert torch.allclose(flat @ flat.T, torch.diag(torch.from_numpy(size**2)), atol=1e-9)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_without_sweeps_a_kernel_of_orthogonal_low_rank_computes_the_same(layer):
    with torch.no_grad():
        terms = [torch.linalg.qr(kernel(size, size, seed=i)).Q[:, :2] for i, size in enumerate(layer.weight.shape)]
        layer.weight.copy_(composed([terms[0] * torch.tensor([2.0, 1.0]), *terms[1:]]))
    small = wb.CPDecomposition(rank=0.3).compress(nn.Sequential(layer))
    x = kernel(*IMAGES[type(layer)])
    assert isinstance(small[0], nn.Sequential) and error(layer(x), small(x)) < 1e-4


def test_cp_makes_four_layers_of_fewer_numbers_at_every_rank():
    layer = nn.Conv2d(12, 16, 3, stride=2, padding=1)
    for rank in (0.05, 0.5, 0.95):
        parts = wb.CPDecomposition(rank=rank, sweeps=2).compress(nn.Sequential(layer))[0]
        assert [tuple(part.kernel_size) for part in parts] == [(1, 1), (3, 1), (1, 3), (1, 1)]
        assert [tuple(part.stride) for part in parts] == [(1, 1), (2, 1), (1, 2), (1, 1)]
        assert parts[0].out_channels == max(1, round(rank * largest_rank(layer.weight)))
        assert sum(p.weight.numel() for p in parts) < layer.weight.numel()


@pytest.mark.parametrize("failure", ["nan", "raises", "diverges"])
def test_a_layer_that_sweeps_fail_on_keeps_the_terms_it_started_from(failure, monkeypatch):
    def fails(tensor, rank, **options):
        if failure == "raises":
            raise torch.linalg.LinAlgError("singular")
        found = parafac(tensor, rank, **options)
        found.factors[0] = found.factors[0] * (float("nan") if failure == "nan" else 1e6)
        return found

    layer = nn.Conv2d(12, 16, 3)
    plain = wb.CPDecomposition(rank=0.3).compress(nn.Sequential(layer))
    monkeypatch.setattr("tensorly.decomposition.parafac", fails)
    small = wb.CPDecomposition(rank=0.3, sweeps=3).compress(nn.Sequential(layer))
    pairs = zip(small.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs)


def test_an_all_zero_kernel_stays_finite():
    layer = nn.Conv2d(12, 16, 3)
    nn.init.zeros_(layer.weight)
    for technique in (wb.Tucker(rank=0.3), wb.CPDecomposition(rank=0.3)):
        assert torch.isfinite(technique.compress(nn.Sequential(layer))(torch.randn(1, 12, 8, 8))).all()


def test_terms_share_their_size_evenly():
    terms = [1e4 * kernel(6, 3), kernel(5, 3, seed=1), 1e-3 * kernel(3, 3, seed=2)]
    even = cp.balanced(terms)
    assert torch.allclose(composed(even), composed(terms), rtol=1e-4, atol=1e-3)
    assert torch.allclose(even[0].norm(dim=0), even[2].norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_last_layer_is_fitted_to_the_outputs_as_torch_would_fit_it_at_each_rank(rank):
    x, weight = kernel(400, 18).double(), kernel(7, 18, seed=1).double()
    x = x * torch.logspace(0, -2, 18).double()
    factors = [kernel(size, 5, seed=i).double() for i, size in enumerate((7, 2, 3, 3))]
    up, *others = fit_outputs(weight, x.T @ x / 400, factors).cut(rank)
    basis = cp.products([factor[:, :rank] for factor in factors[1:]])
    exact = torch.linalg.lstsq(x @ basis.T, x @ weight.T).solution
    ours = (up @ cp.products(others)).double()
    wanted = x @ weight.flatten(1).T
    assert (x @ ours.T - wanted).norm() < 1.001 * (x @ basis.T @ exact - wanted).norm()


def test_outputs_are_nearer_when_they_count_than_when_only_weights_do():
    x, weight = kernel(500, 90).double() * torch.logspace(0, -2, 90).double(), kernel(16, 10, 3, 3)
    moment = x.T @ x / 500
    far = lambda terms: float((x @ (composed(terms) - weight).flatten(1).double().T).norm())
    assert far(cp_for(weight, moment).cut(12)) < 0.9 * far(cp_for(weight, None).cut(12))


def test_the_backend_that_others_chose_stays():
    tensorly.set_backend("pytorch")
    try:
        small = wb.Tucker(rank=0.3).compress(nn.Sequential(nn.Conv2d(12, 16, 3)))
        assert len(small[0]) == 3 and tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")
    wb.CPDecomposition(rank=0.3, sweeps=2).compress(nn.Sequential(nn.Conv2d(12, 16, 3)))
    assert tensorly.get_backend() == "numpy"
