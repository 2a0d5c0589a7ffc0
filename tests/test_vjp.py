import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from carv.gradient import Renders
from carv.rng import stream
from carv.tasks.sds.field import VoxelField
from carv.tasks.toy import GaussianToy
from carv.variance.vjp import (
    batched_pull_back,
    batched_task_pull_back,
    draw_gram,
    jacobian_sketch,
    latent_gram,
    per_example_gradients,
)
from carv.world.cameras import held_out_cameras


def mlp():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 6)).double()
    return net(torch.randn(3, dtype=torch.float64)).view(2, 3), tuple(net.parameters())


def voxels():
    torch.manual_seed(0)
    field = VoxelField(5, 6, density_scale=2.0).double()
    for parameter in field.parameters():
        parameter.data = torch.randn_like(parameter)
    return field(held_out_cameras(1), 5)[0], tuple(field.parameters())


class Numpy(torch.autograd.Function):
    """An operation whose backward pass leaves torch, so that nothing can batch it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.numpy() * g.numpy())


def outside():
    x = torch.linspace(1, 2, 6, dtype=torch.float64).requires_grad_()
    return Numpy.apply(x).view(2, 3), (x,)


def slow():
    """An operation for which vmap only has its silent loop."""
    x = torch.ones(8, dtype=torch.float64, requires_grad=True)
    picture = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.full((1, 1, 2), 0.3, dtype=torch.float64)
    return nn.functional.fractional_max_pool2d(picture * x, 2, output_size=3, _random_samples=samples), (x,)


def loop(z, parameters, cotangents):
    grads = [torch.autograd.grad(z, parameters, f, retain_graph=True) for f in cotangents]
    return torch.stack([torch.cat([part.flatten() for part in g]) for g in grads])


def cotangents(z, count=9):
    return torch.randn((count, *z.shape), generator=torch.Generator().manual_seed(1), dtype=z.dtype)


@pytest.mark.parametrize("budget", [1, 5000, 2**28])
@pytest.mark.parametrize(("upstream", "looped"), [(mlp, False), (voxels, False), (outside, True), (slow, True)])
def test_batched_gradients_are_those_of_the_loop_and_a_loop_is_said(upstream, looped, budget):
    z, parameters = upstream()
    f = cotangents(z)
    for _ in range(2):  # the graph is kept, and a fallback is noticed every time
        found = batched_pull_back(z, parameters, f, budget)
        torch.testing.assert_close(found.matrix(), loop(z, parameters, f))
        assert [part.shape for part in found.gradient] == [(9, *p.shape) for p in parameters]
        if budget == 2**28:  # a small one makes chunks of one, where there is nothing to batch
            assert found.looped == looped


def test_a_parameter_that_the_state_does_not_depend_on_gets_zeros():
    z, parameters = mlp()
    idle = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    f = cotangents(z)
    assert not batched_pull_back(z, (*parameters, idle), f).gradient[-1].any()
    probes = tuple(torch.randn(4, *p.shape, dtype=torch.float64) for p in (*parameters, idle))
    torch.testing.assert_close(
        jacobian_sketch(z, (*parameters, idle), probes), jacobian_sketch(z, parameters, probes[:-1])
    )
    assert not jacobian_sketch(z, (idle,), probes[-1:]).any()


def test_gradients_go_through_a_pipelines_own_pull_back():
    task = GaussianToy(dim=3)
    state = task.upstream(Renders((stream(0),), 0, 1))
    f = torch.randn(5, 1, 3, dtype=torch.float64)
    found = batched_task_pull_back(task, state, f)
    torch.testing.assert_close(found.matrix(), torch.stack([task.pull_back(state, one, True)[0] for one in f]))
    assert not found.looped


def test_a_pipeline_that_cannot_be_batched_is_looped_over():
    class Backward(GaussianToy):
        def pull_back(self, state, f, retain=False):
            self.theta.grad = None
            state.backward(f, retain_graph=retain)
            return (self.theta.grad.clone(),)

    task = Backward(dim=3)
    state = task.upstream(Renders((stream(0),), 0, 1))
    f = torch.randn(5, 1, 3, dtype=torch.float64)
    found = batched_task_pull_back(task, state, f)
    truth = GaussianToy(dim=3)
    same_state = truth.upstream(Renders((stream(0),), 0, 1))
    torch.testing.assert_close(found.matrix(), torch.stack([truth.pull_back(same_state, one, True)[0] for one in f]))


@pytest.mark.parametrize("upstream", [mlp, voxels])
@pytest.mark.parametrize("count", [4, 200])
def test_inner_products_of_draws_need_no_gradients(upstream, count):
    z, parameters = upstream()
    f = cotangents(z, count)
    g = loop(z, parameters, f)
    torch.testing.assert_close(draw_gram(z, parameters, f), g @ g.T)
    gram = latent_gram(z, parameters)
    torch.testing.assert_close(f.flatten(1) @ gram @ f.flatten(1).T, g @ g.T)


def test_a_jacobian_that_does_not_fit_is_refused():
    z, parameters = mlp()
    with pytest.raises(ValueError, match="jacobian_sketch"):
        latent_gram(z, parameters, memory_budget_bytes=100)


@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("upstream", [mlp, voxels])
def test_the_sketch_is_the_projection_of_every_gradient(upstream, budget):
    z, parameters = upstream()
    rng = torch.Generator().manual_seed(2)
    probes = tuple(torch.randn((5, *p.shape), generator=rng, dtype=torch.float64) for p in parameters)
    f = cotangents(z)
    directions = torch.cat([part.flatten(1) for part in probes], 1)
    sketch = jacobian_sketch(z, parameters, probes, budget)
    assert sketch.shape == (5, *z.shape)
    torch.testing.assert_close(f.flatten(1) @ sketch.flatten(1).T, loop(z, parameters, f) @ directions.T)


def test_inner_products_of_sketches_are_unbiased():
    """400 sketches of 4 probes: |g|^2 within 4 standard errors (false alarm 6e-5), the error at most 5 %."""
    z, parameters = mlp()
    f = cotangents(z, 1)
    truth = float(loop(z, parameters, f).square().sum())
    rng = torch.Generator().manual_seed(3)
    found = []
    for _ in range(400):
        probes = tuple(torch.randn((4, *p.shape), generator=rng, dtype=torch.float64) for p in parameters)
        found.append(float((jacobian_sketch(z, parameters, probes).flatten(1) @ f.flatten()).square().mean()))
    values = torch.tensor(found)
    error = float(values.std()) / math.sqrt(400)
    assert error < 0.05 * truth
    assert abs(float(values.mean()) - truth) < 4 * error


@pytest.mark.parametrize("budget", [1, 2**28])
def test_per_example_gradients_are_those_of_the_loop(budget):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3)).double()
    parameters = dict(net.named_parameters())
    x, y = torch.randn(5, 2, 6, 6).double(), torch.randn(5, 2, 4, 4).double()

    def loss(weights, x, y):
        return (functional_call(net, weights, (x[None],))[0] - y).square().sum()

    found = per_example_gradients(loss, parameters, x, y, memory_budget_bytes=budget)
    for i in range(5):
        truth = torch.autograd.grad(loss(parameters, x[i], y[i]), tuple(parameters.values()))
        for name, part in zip(parameters, truth, strict=True):
            torch.testing.assert_close(found[name][i], part)
    with pytest.raises(ValueError, match="same number"):
        per_example_gradients(loss, parameters, x, y[:3])


def test_wrong_shapes_and_budgets_are_refused():
    z, parameters = mlp()
    with pytest.raises(ValueError, match="cotangents must have shape"):
        batched_pull_back(z, parameters, torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="budget must be positive"):
        batched_pull_back(z, parameters, cotangents(z), 0)
