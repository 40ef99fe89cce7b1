import torch
from torch import nn

from sret.layers import Coefficients, LearnableResidual

X = torch.randn(2, 7, 24, dtype=torch.double)


def branch() -> nn.Module:
    return nn.Linear(24, 24, dtype=torch.double)


def test_a_learnable_residual_starts_as_a_plain_residual():
    f = branch()
    torch.testing.assert_close(LearnableResidual(f).double()(X), X + f(X))


def test_the_formula():
    f, norm = branch(), nn.LayerNorm(24, dtype=torch.double)
    residual = LearnableResidual(f, norm).double()
    nn.init.constant_(residual.alpha, 0.3)
    nn.init.constant_(residual.beta, -2.0)
    torch.testing.assert_close(residual(X), 0.3 * X - 2.0 * f(norm(X)))


def test_without_its_branch_it_is_the_identity():
    residual = LearnableResidual(branch()).double()
    nn.init.zeros_(residual.beta)
    torch.testing.assert_close(residual(X), X)


def test_left_out_it_has_no_coefficients_and_adds_plainly():
    f = branch()
    residual = LearnableResidual(f, coefficients=Coefficients(is_learnable=False))
    assert {name for name, _ in residual.named_parameters()} == {"branch.weight", "branch.bias"}
    torch.testing.assert_close(residual(X), X + f(X))


def test_stochastic_depth_drops_whole_samples_in_training_only():
    f = branch()
    residual = LearnableResidual(f, drop_prob=0.5).double()
    x = X[:1].expand(200, 7, 24)
    y = residual.train()(x)
    is_dropped = (y == x).flatten(1).all(dim=1)
    assert 60 < int(is_dropped.sum()) < 140
    torch.testing.assert_close(y[~is_dropped], (x + 2 * f(x))[~is_dropped])  # the kept are scaled up
    torch.testing.assert_close(residual.eval()(X), X + f(X))
