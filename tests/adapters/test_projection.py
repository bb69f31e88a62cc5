import numpy as np
import pytest
import torch
from torch import nn

from vlkr.adapters import KRAdapter, LoRA, project, project_model
from vlkr.errors import VlkrError


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.detach().double()).item()


def tail(matrix, rank):
    return np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:])


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize(
    ("rule", "num_terms"), [("reference", 1), ("balanced", 1), ("reference", 2)]
)
def test_kradapter_projection_has_the_error_of_the_rows_truncated_svds(shape, rule, num_terms):
    delta = torch.randn(shape)
    adapter = project(delta, "kradapter", rule=rule, num_terms=num_terms, scale=2.0)
    assert isinstance(adapter, KRAdapter)
    rows = delta if shape[0] <= shape[1] else delta.T
    k1 = 4 if rule == "reference" else int(np.sqrt(max(shape)))
    k2 = max(shape) // k1
    grids = [row.reshape(k2, k1) for row in rows]
    expected = np.linalg.norm([tail(grid, num_terms) for grid in grids])
    assert norm(delta - adapter.delta()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rule", ["reference", "balanced"])
@pytest.mark.parametrize(
    # Where the columns do not divide the long side the projection is only near the best.
    ("shape", "error"),
    [((12, 12), 1e-5), ((16, 8), 1e-5), ((9, 14), 0.1), ((14, 9), 0.1)],
)
def test_a_kradapter_is_its_own_projection(rule, shape, error):
    made = KRAdapter(shape[1], shape[0], rule=rule)
    for p in made.parameters():
        p.data.normal_()
    found = project(made.delta().detach(), "kradapter", rule=rule)
    assert norm(found.delta() - made.delta()) < error * norm(made.delta())


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_projection_has_eckart_and_youngs_error(rank):
    delta = torch.randn(8, 12)
    adapter = project(delta, "lora", rank=rank, alpha=2.0 * rank)
    assert isinstance(adapter, LoRA)
    assert norm(delta - adapter.delta()) == pytest.approx(tail(delta, rank), rel=1e-4)


def test_a_projected_model_is_the_base_plus_the_projections():
    base = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    tuned = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    tuned[0].bias.data.copy_(base[0].bias)
    tuned[2].bias.data.copy_(base[2].bias)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    # A LoRA of full rank represents any change of the weights.
    report = project_model(base, tuned.state_dict(), "lora", targets=["*"], rank=8)
    x = torch.randn(5, 12)
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-4, atol=1e-5)
    for projected, i in zip(report, (0, 2), strict=True):
        change = tuned[i].weight - before[f"{i}.weight"]
        assert projected.target.module == str(i)
        assert projected.error < 1e-5
        expected = norm(change) / norm(before[f"{i}.weight"])
        assert projected.delta_norm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((torch.randn(4), "kradapter"), {}, r"\(4,\)"),
        ((torch.full((4, 4), torch.nan), "kradapter"), {}, "finite"),
        ((torch.randn(4, 4), "vera"), {}, "'vera'"),
        ((torch.randn(4, 4), "kradapter"), {"num_factors": 3}, "num_factors"),
        ((torch.randn(4, 4), "kradapter"), {"scale": 0.0}, "scale"),
        ((torch.randn(4, 4), "lora"), {"alpha": 0.0}, "alpha"),
        ((torch.randn(4, 4), "lora"), {"rnk": 3}, "'rnk'"),
        ((torch.randn(4, 4), "lorra"), {}, "'lorra'"),
    ],
)
def test_what_cannot_be_projected_is_named(arguments, options, named):
    with pytest.raises(VlkrError, match=named):
        project(*arguments, **options)


def test_a_tuned_model_of_another_shape_is_named():
    base = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(VlkrError, match=r"0\.weight"):
        project_model(base, {}, "lora", targets=["0"])
    with pytest.raises(VlkrError, match=r"\(8, 11\) at 0\.weight"):
        project_model(base, {"0.weight": torch.zeros(8, 11)}, "lora", targets=["0"])
    assert type(base[0]) is nn.Linear
