"""FlatAdam is torch's Adam on the trainable parameters, eager and traced, and averages over ranks."""

import copy
import math

import pytest
import torch
from torch import nn

from common.flat_adam import FlatAdam


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def losses():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 4, generator=generator) for _ in range(5)]


def train(model, optimizer, step):
    for x in losses():
        step(optimizer, model(x).square().sum())
    return model


def ours(optimizer, loss):
    optimizer.compute_gradients(loss)
    optimizer.clip_gradients(1.0)
    optimizer.step()


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_those_of_torch(compiled):
    expected = network()
    adam = torch.optim.Adam(expected.parameters(), lr=0.01, eps=1e-5)
    for x in losses():
        adam.zero_grad()
        expected(x).square().sum().backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        adam.step()

    model = network()
    optimizer = FlatAdam(model.parameters(), torch.tensor(0.01), eps=1e-5)

    def update(x):
        ours(optimizer, model(x).square().sum())

    if compiled:
        torch._dynamo.reset()
        torch._dynamo.config.trace_autograd_ops = True
        update = torch.compile(update, backend="eager", fullgraph=True)
    for x in losses():
        update(x)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(optimizer.flat.detach(), flat)  # the parameters are views of it
    assert optimizer.adam.state[optimizer.flat]["step"] == 5


def test_frozen_parameters_are_left_alone():
    model = network()
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    optimizer = FlatAdam(model.parameters(), torch.tensor(0.1))
    assert len(optimizer.flat) == 8 * 2 + 2
    before = model[2].weight.clone()
    train(model, optimizer, ours)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in model[0].state_dict().items())
    assert not torch.equal(model[2].weight, before)


def test_a_parameter_the_loss_does_not_depend_on_has_no_gradient():
    model = network()
    optimizer = FlatAdam([*model.parameters(), unused := nn.Parameter(torch.ones(3))], torch.tensor(0.1))
    train(model, optimizer, ours)
    assert torch.equal(unused.detach(), torch.ones(3))


def test_narrow_parameters_have_float32_masters():
    """Steps too small for bfloat16 add up in the master until the parameter moves."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(2))
    optimizer = FlatAdam([parameter, wide], torch.tensor(5e-4))
    for _ in range(2):
        ours(optimizer, parameter.float().sum() + wide.sum())
    assert torch.equal(parameter.detach(), torch.ones(4, dtype=torch.bfloat16))  # 1 - 0.001 rounds to 1
    for _ in range(18):
        ours(optimizer, parameter.float().sum() + wide.sum())
    torch.testing.assert_close(optimizer.flat.detach(), torch.full((6,), 0.99), atol=1e-4, rtol=0)
    assert parameter.dtype == torch.bfloat16 and torch.equal(parameter.detach(), torch.full((4,), 0.99).bfloat16())


def test_gradients_accumulate():
    model = network()
    optimizer = FlatAdam(model.parameters(), torch.tensor(0.1))
    x = losses()[0]
    optimizer.compute_gradients(model(x[:8]).square().sum())
    optimizer.compute_gradients(model(x[8:]).square().sum(), accumulate=True)
    summed = optimizer.grad.clone()
    optimizer.compute_gradients(model(x).square().sum())
    torch.testing.assert_close(summed, optimizer.grad)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_becomes_zero_and_is_counted(poison):
    model = network()
    optimizer = FlatAdam(model.parameters(), torch.tensor(0.1))
    optimizer.compute_gradients(model(losses()[0]).sum() * poison)
    assert not torch.isfinite(optimizer.clip_gradients(1.0))
    assert not optimizer.grad.any() and optimizer.not_finite == 1


def test_several_optimisers_share_a_model():
    """As an actor's and a critic's do: each moves its own parameters only."""
    actor, critic = network(), network()
    optimizers = [FlatAdam(m.parameters(), torch.tensor(0.1)) for m in (actor, critic)]
    x = losses()[0]
    before = [p.clone() for p in critic.parameters()]
    ours(optimizers[0], (actor(x) * critic(x)).sum())
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    assert all(o.all_reduce(torch.ones(())) == (1,) for o in optimizers)  # alone, means are what they were


def test_state_is_restored_with_its_learning_rate():
    one, two = network(), network()
    first, second = (FlatAdam(m.parameters(), torch.tensor(lr)) for m, lr in ((one, 0.1), (two, 0.5)))
    train(one, first, ours)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.lr == pytest.approx(0.1)
    for model, optimizer in ((one, first), (two, second)):
        ours(optimizer, model(losses()[0]).square().sum())
    assert torch.equal(first.flat, second.flat)
    second.lr.fill_(0.0)  # the tensor that Adam reads
    before = second.flat.detach().clone()
    ours(second, two(losses()[0]).square().sum())
    assert torch.equal(second.flat.detach(), before)
