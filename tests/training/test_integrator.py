import contextlib
import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from reference import best_of_rank, one_layer
from tolerance import EXACT, RUN, close, is_orthonormal
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from geolora_pl import (
    AdapterConfig,
    GeoLoRAWarning,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    inject_adapters,
    parameter_groups,
)
from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.training import integrator as integrator_module
from geolora_pl.training.plan import Plan
from geolora_pl.training.stacks import owners


def two_shapes(probes=2, **settings):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12), nn.Linear(12, 3))
    adapters = inject_adapters(
        model,
        AdapterConfig(init_rank=2, max_rank=6, target_modules=["0", "2", "4"], modules_to_save=["5"], probes=probes),
    )
    return model, adapters, RankAdaptiveIntegrator(model, **settings)


def pending(adapters):
    """Whether any adapter holds a step: what probes remember, in their columns of K, is none."""
    return any(layer.K[:, layer.probes :].any() or layer.L.any() for layer in adapters.values())


def columns_in_use(adapters):
    return {name: int(layer.U[:, layer.probes :].any(0).sum()) for name, layer in adapters.items()}


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 8, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()


def train(model, integrator, optimizer, steps, start=0):
    for t in range(start, start + steps):
        backward(model, t)
        optimizer.step()
        integrator.step(optimizer)


def snapshot(model, optimizer):
    values = [p.clone() for p in model.parameters()]
    state = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return values + state


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def optimizer_of(model, **settings):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **{"lr": 1e-2, **settings})


@pytest.mark.parametrize("probes", [0, 2])
def test_adapts_every_n_optimizer_steps(probes):
    model, adapters, integrator = two_shapes(adapt_every=3, probes=probes)
    optimizer = optimizer_of(model)
    adapted = []
    for t in range(1, 12):
        backward(model, t)
        optimizer.step()
        adapted += [t] * integrator.step(optimizer)
        assert pending(adapters) == (t not in adapted)
    assert adapted == [1, 2, 4, 7, 10]
    assert (integrator.adaptations, integrator.steps, integrator.total_steps) == (5, 1, 11)


def adapted_at(model, integrator, optimizer, steps):
    """The steps after which the factors were retracted, with nothing left pending."""
    adapted = []
    for t in steps:
        backward(model, t)
        optimizer.step()
        if integrator.step(optimizer):
            adapted.append(t)
            assert not pending(integrator.adapters)
    return adapted


def test_the_first_retractions_come_after_1_2_4_steps_until_the_cadence_is_reached():
    model, _, integrator = two_shapes(adapt_every=10)
    optimizer = optimizer_of(model)
    assert adapted_at(model, integrator, optimizer, range(1, 37)) == [1, 2, 4, 8, 16, 26, 36]


def test_a_longer_cadence_of_a_run_that_goes_on_is_reached_from_where_the_run_is():
    model, _, integrator = two_shapes(adapt_every=3)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 7)
    assert (integrator.adaptations, integrator.steps) == (4, 0)
    resumed = RankAdaptiveIntegrator(model, adapt_every=100)
    resumed.load_state_dict(integrator.state_dict())
    integrator.close()
    assert adapted_at(model, resumed, optimizer, range(8, 30)) == [14, 28]


def test_a_retraction_that_breaks_off_leaves_the_ranks_of_the_factors_and_the_decay_of_the_others(monkeypatch):
    model, adapters, integrator = two_shapes(tau=0.0)
    backward(model)
    optimizer_of(model, weight_decay=0.1).step()
    move = RankAdaptiveIntegrator._move

    def interrupted(self, group, rank, optimizer):
        if "2" in group.names:
            raise KeyboardInterrupt
        move(self, group, rank, optimizer)

    monkeypatch.setattr(RankAdaptiveIntegrator, "_move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        integrator.retract()
    assert adapters["2"].rank == 2
    assert adapters["2"].K.any()  # its step is still pending
    assert {name: layer.rank for name, layer in adapters.items()} == columns_in_use(adapters)
    assert integrator.state_dict()["decay"] == {"0": 1.0, "2": 1 - 1e-2 * 0.1, "4": 1.0}

    def unread(plan):
        raise KeyboardInterrupt

    monkeypatch.undo()
    monkeypatch.setattr(Plan, "on_host", unread)
    with pytest.raises(KeyboardInterrupt):
        integrator.retract()
    assert adapters["2"].rank == 2
    assert adapters["2"].K.any()
    assert {name: layer.rank for name, layer in adapters.items()} == columns_in_use(adapters)


def test_a_retraction_that_breaks_off_at_its_very_end_leaves_the_ranks_of_the_factors(monkeypatch):
    """A user presses Ctrl-C when all factors have moved; the products must not leave out their new columns."""
    model, adapters, integrator = two_shapes(tau=0.0)
    backward(model)
    optimizer_of(model).step()

    def interrupted(layer, name, value):
        if name == "rank":
            monkeypatch.undo()
            raise KeyboardInterrupt
        nn.Module.__setattr__(layer, name, value)

    monkeypatch.setattr(GeoLoRALayer, "__setattr__", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        integrator.retract()
    assert max(integrator.ranks().values()) > 2
    assert integrator.ranks() == columns_in_use(adapters)


@pytest.mark.parametrize("probes", [0, 2])
def test_the_first_retractions_stay_within_the_budget(probes):
    model, _, integrator = two_shapes(adapt_every=10, budget=80, probes=probes)
    optimizer = optimizer_of(model)
    for t in range(8):
        train(model, integrator, optimizer, 1, start=t)
        assert integrator.adapter_parameters() <= 80


def test_where_ranks_end_hardly_depends_on_where_they_start():
    n = 32
    torch.manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(n, n))[0] for _ in range(2))
    target, x = P @ torch.diag(0.9 ** torch.arange(float(n))) @ Q, torch.randn(256, n)

    def end(start, probes):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(n, n, bias=False))
        adapters = inject_adapters(model, AdapterConfig(init_rank=start, max_rank=16, probes=probes))
        integrator = RankAdaptiveIntegrator(model, tau=0.2, adapt_every=10)
        optimizer = optimizer_of(model)
        wanted = x @ (model[0].weight + target).detach().T
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
            integrator.step(optimizer)
        return adapters["0"].rank

    assert abs(end(2, probes=2) - end(16, probes=2)) <= 2
    assert end(2, probes=0) <= end(16, probes=0) / 2


@pytest.mark.parametrize("probes", [0, 2])
def test_step_without_an_optimizer_step_does_nothing(probes):
    model, _, integrator = two_shapes(probes=probes)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 1)
    before = snapshot(model, optimizer)
    assert not integrator.step(optimizer)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("probes", [0, 2])
def test_increments_written_by_hand_are_retracted(probes):
    model, adapters, integrator = two_shapes(probes=probes)
    optimizer = optimizer_of(model)
    with torch.no_grad():
        adapters["2"].K[:, : probes + 2].normal_()
    expected = adapters["2"].delta_weight().detach()
    assert integrator.step(optimizer)
    assert not pending(adapters)
    close(adapters["2"].delta_weight().detach(), expected)
    assert not integrator.step(optimizer)


@pytest.mark.parametrize("probes", [0, 2])
def test_batched_retraction_is_the_same_as_one_by_one(probes):
    model, adapters, integrator = two_shapes(tau=0.2, probes=probes)
    model.double()
    for layer in adapters.values():
        nn.init.normal_(layer.K[:, : probes + layer.rank].data)
        nn.init.normal_(layer.L[:, : probes + layer.rank].data)
    dense = {name: layer.delta_weight().detach() for name, layer in adapters.items()}
    integrator.retract()
    for name, layer in adapters.items():
        sigma = torch.linalg.svdvals(dense[name])
        rank = next(r for r in range(1, 7) if sigma[r:].norm() <= 0.2 * sigma.norm())
        assert layer.rank == rank
        close(layer.delta_weight().detach(), best_of_rank(dense[name], rank), within=EXACT)


@pytest.mark.parametrize("probes", [0, 2])
def test_nothing_pending_is_a_no_op_to_the_bit(probes):
    model, adapters, integrator = two_shapes(tau=0.3, probes=probes)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 3)
    with torch.no_grad():  # spectra of which a second truncation would drop more
        for layer in adapters.values():
            layer.S[: layer.rank, : layer.rank] = torch.diag(0.29 ** torch.arange(float(layer.rank)))
    with torch.no_grad():  # which the last retraction does in all adapters
        for layer in adapters.values():
            for factor in (layer.U, layer.V, layer.K, layer.L):
                factor[:, :probes] = 0
    before = snapshot(model, optimizer)
    integrator.retract(optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert not integrator.unfinished


def test_the_last_retraction_drops_what_never_took_a_step_and_zeroes_the_probes_of_what_moves():
    model, adapters, integrator = two_shapes(tau=0.2)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 1)
    dead = {name: int((layer.S.diagonal()[: layer.rank] == 0).sum()) for name, layer in adapters.items()}
    ranks, outputs = integrator.ranks(), {name: layer.delta_weight() for name, layer in adapters.items()}
    assert max(dead.values()) > 0
    assert integrator.unfinished
    integrator.retract(optimizer)
    assert not integrator.unfinished
    assert integrator.ranks() == {name: ranks[name] - dead[name] for name in adapters}
    for name, layer in adapters.items():
        close(layer.delta_weight(), outputs[name])
        if dead[name]:
            assert not layer.U[:, : layer.probes].any()
            assert not layer.K.any()
    before = snapshot(model, optimizer)
    integrator.retract(optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_adapters_without_a_gradient_are_left_alone_and_named():
    model, adapters, integrator = two_shapes()
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 2)
    before = [p.clone() for p in adapters["2"].parameters()]
    for t in range(2):
        backward(model, t)
        adapters["2"].K.grad = adapters["2"].L.grad = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages = [str(w.message) for w in caught if w.category is GeoLoRAWarning]
        assert [m.split(":")[0] for m in messages] == (["no gradient reaches the adapters 2"] if t == 0 else [])
        integrator.step(optimizer)
    assert_same(list(adapters["2"].parameters()), before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("place", ["adapter", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_whole(first, place, value, with_closure):
    model, adapters, integrator = two_shapes(adapt_every=2)
    optimizer = optimizer_of(model, weight_decay=0.1)
    if not first:
        train(model, integrator, optimizer, 3)
    before, steps = snapshot(model, optimizer), integrator.steps

    parameter = adapters["2"].K if place == "adapter" else model[5].weight

    def broken():
        backward(model, 99)
        parameter.grad[0, 0] = value

    if not with_closure:
        broken()
    with pytest.warns(GeoLoRAWarning, match=r"2.K is not finite" if place == "adapter" else r"5.weight is not finite"):
        optimizer.step(broken if with_closure else None)
    assert not integrator.step(optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert (integrator.skipped_steps, integrator.steps) == (1, steps)
    train(model, integrator, optimizer, 2)
    assert integrator.total_steps == (2 if first else 5)


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model, _, integrator = two_shapes()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t, overflow in enumerate([False, True, False]):
        generator = torch.Generator().manual_seed(t)
        model.zero_grad()
        scaler.scale(model(torch.randn(4, 8, generator=generator)).square().mean()).backward()
        if overflow:
            model[5].weight.grad[0, 0] = float("inf")
        before = snapshot(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert integrator.step(optimizer) == (not overflow)
        if overflow:
            assert_same(snapshot(model, optimizer), before)
    assert (integrator.total_steps, integrator.skipped_steps) == (2, 0)


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("adapt_every", [1, 3])
def test_weight_decay_decays_the_update_with_the_lr_of_each_step(adapt_every, probes):
    """With a gradient of zero, what is left of an AdamW step is its decay."""
    _, adapter, integrator = one_layer(8, 6, 2, 4, tau=0.0, adapt_every=adapt_every, probes=probes)
    integrator.total_steps = 100  # in the middle of a run: the first retractions come sooner
    with torch.no_grad():
        adapter.S[:2, :2] = torch.diag(torch.tensor([2.0, 1.0]).double())
        adapter.K[:, : probes + 2] = 1e-3
    expected = adapter.delta_weight().detach()
    optimizer = torch.optim.AdamW([adapter.K, adapter.L], lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    for t in range(3):
        adapter.K.grad, adapter.L.grad = torch.zeros_like(adapter.K), torch.zeros_like(adapter.L)
        optimizer.step()
        scheduler.step()  # before the integrator, as Lightning does it
        integrator.step(optimizer)
        if adapt_every == 1 and t < 2:
            with torch.no_grad():
                adapter.K[:, probes : probes + 1] += 1e-9  # something must be pending for a retraction to happen
        expected *= 1 - 0.1 / (t + 1) * 0.5
    close(adapter.delta_weight(), expected, within=1e-8)  # what was added is in the way


def test_ranks_stay_when_rank_changes_is_off():
    model, _, integrator = two_shapes(tau=0.05)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 3)
    ranks = integrator.ranks()
    integrator.rank_changes = False
    train(model, integrator, optimizer, 5, start=3)
    assert integrator.ranks() == ranks
    assert integrator.adaptations == 8


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_the_budget_holds_exactly_and_min_rank_counts_inside_it(tau, probes):
    model, _, integrator = two_shapes(tau=tau, budget=100, min_rank=1, probes=probes)
    optimizer = optimizer_of(model)
    for t in range(6):
        train(model, integrator, optimizer, 1, start=t)
        assert integrator.adapter_parameters() <= 100
        assert min(integrator.ranks().values()) >= 1
    if tau == 0:
        assert integrator.adapter_parameters() == 100


@pytest.mark.parametrize("probes", [0, 2])
def test_min_rank_zero_lets_the_budget_prune_and_rank_zero_keeps_working(probes):
    model, adapters, integrator = two_shapes(tau=0.0, budget=40, min_rank=0, probes=probes)
    optimizer = optimizer_of(model)
    train(model, integrator, optimizer, 5)
    assert integrator.adapter_parameters() == 40
    assert 0 in integrator.ranks().values()
    pruned = next(layer for layer in adapters.values() if layer.rank == 0)
    assert torch.count_nonzero(pruned.delta_weight()) == 0


def test_truncation_error_is_the_relative_norm_of_what_was_dropped():
    _, adapter, integrator = one_layer(8, 6, 3, 3, tau=0.0)
    nn.init.normal_(adapter.K)
    nn.init.normal_(adapter.L)
    before = adapter.delta_weight().detach()
    integrator.retract()
    error = (adapter.delta_weight().detach() - before).norm() / before.norm()
    assert integrator.truncation_error == pytest.approx(float(error), rel=1e-9)


def test_an_optimizer_without_the_factors_is_refused():
    model, adapters, integrator = two_shapes()
    with pytest.raises(ValueError, match="does not hold the factors of the adapter 0: make it after inject_adapters"):
        integrator.step(torch.optim.SGD(model[5].parameters(), lr=0.1))
    only_K = torch.optim.SGD([layer.K for layer in adapters.values()], lr=0.1)
    with pytest.raises(ValueError, match="does not hold"):
        integrator.step(only_K)


def test_steps_of_other_optimizers_are_none_of_its_business():
    model, _, integrator = two_shapes()
    optimizer = optimizer_of(model)
    other = nn.Linear(2, 2)
    other(torch.full((1, 2), float("nan"))).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not integrator.step(optimizer)
    assert integrator.skipped_steps == 0


def is_watched(model):
    """Whether anybody skips a step of this model whose gradients are not finite."""
    optimizer = optimizer_of(model)
    backward(model)
    model[5].bias.grad[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeoLoRAWarning)
        optimizer.step()
    return not model[5].bias.isnan().any()


def test_an_integrator_that_is_gone_watches_no_more():
    model, _, integrator = two_shapes()
    gone = weakref.ref(integrator)
    del integrator
    gc.collect()
    assert gone() is None
    assert not is_watched(model)


@pytest.mark.parametrize("at", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
@pytest.mark.parametrize("leave", ["gone", "closed"])
def test_an_integrator_may_leave_while_an_optimizer_steps(at, leave):
    """The garbage collector took an old integrator while torch went through the hooks of a step, and the step ended in
    a RuntimeError, "OrderedDict mutated during iteration"; closing one in a hook did the same."""
    old = [two_shapes()[2]]
    hook = at(lambda *_: old.clear() if leave == "gone" else old[0].close())
    model, _, integrator = two_shapes()
    optimizer = optimizer_of(model)
    backward(model)
    gc.collect()
    optimizer.step()
    hook.remove()
    assert integrator.step(optimizer)


@pytest.mark.parametrize("copied", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_closed_integrator_and_its_copies_watch_nothing(copied):
    model, _, integrator = two_shapes()
    assert is_watched(model)
    integrator.close()
    model, again = copied((model, integrator))
    assert again.ranks() == integrator.ranks()
    assert not is_watched(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_integrator_adapts(copied):
    model, _, integrator = two_shapes()
    model, integrator = copied((model, integrator))
    train(model, integrator, optimizer_of(model), 3)
    assert integrator.adaptations == 3


def test_parameters_replaced_by_load_state_dict_are_followed():
    model, adapters, integrator = two_shapes()
    old = [p for layer in adapters.values() for p in (layer.K, layer.L)]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    train(model, integrator, optimizer_of(model), 2)
    assert integrator.adaptations == 2
    assert all(p is not layer.K for p in old for layer in adapters.values())


def test_empty_and_sparse_gradients_are_no_trouble():
    model, _, integrator = two_shapes()
    embedding, empty = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.zeros(0, 3))
    optimizer = torch.optim.SGD([*(p for p in model.parameters() if p.requires_grad), embedding.weight, empty], lr=0.1)
    backward(model)
    embedding(torch.tensor([], dtype=torch.long)).sum().backward()
    empty.grad = torch.zeros(0, 3)
    optimizer.step()
    assert integrator.step(optimizer)
    backward(model)
    embedding(torch.tensor([1])).sum().backward()
    embedding.weight.grad._values()[0, 0] = float("nan")
    with pytest.warns(GeoLoRAWarning, match="the gradient of a parameter is not finite"):
        optimizer.step()


def test_a_step_in_which_no_adapter_has_a_gradient_is_named():
    model, _, integrator = two_shapes()
    optimizer = optimizer_of(model)
    model[5](torch.randn(4, 12)).sum().backward()
    with pytest.warns(GeoLoRAWarning, match="no gradient reaches any adapter.*use_reentrant=False"):
        optimizer.step()
    assert not integrator.step(optimizer)


@pytest.mark.parametrize("refused", [torch.optim.LBFGS, torch.optim.Rprop])
def test_optimizers_that_cannot_move_with_the_bases_are_refused(refused):
    model, _, integrator = two_shapes()
    with pytest.raises(ValueError, match=f"{refused.__name__} keeps a history"):
        integrator.step(refused([p for p in model.parameters() if p.requires_grad]))


def test_a_half_frozen_adapter_is_refused():
    model, adapters, integrator = two_shapes()
    adapters["2"].K.requires_grad_(False)
    with pytest.raises(ValueError, match="one of K and L of the adapter 2 is frozen"):
        integrator.step(optimizer_of(model))


def test_a_closed_integrator_watches_no_more():
    model, _, integrator = two_shapes()
    integrator.close()
    backward(model)
    model[5].weight.grad[0, 0] = float("nan")
    optimizer_of(model).step()
    assert integrator.skipped_steps == 0


def test_state_dict_resumes_cadence_and_pending_decay_exactly():
    def fresh():
        torch.manual_seed(3)
        model, _, integrator = two_shapes(adapt_every=3)
        return model, integrator, optimizer_of(model, weight_decay=0.1)

    model, integrator, optimizer = fresh()
    train(model, integrator, optimizer, 4)
    saved = model.state_dict(), integrator.state_dict(), optimizer.state_dict()
    saved = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, saved)
    train(model, integrator, optimizer, 4, start=4)

    resumed, integrator2, optimizer2 = fresh()
    for target, state in zip((resumed, integrator2, optimizer2), saved, strict=True):
        target.load_state_dict(state)
    train(resumed, integrator2, optimizer2, 4, start=4)
    assert_same(list(resumed.parameters()), list(model.parameters()))
    assert integrator2.ranks() == integrator.ranks()


def test_works_with_parameter_groups_of_the_package():
    model, _, integrator = two_shapes()
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)
    train(model, integrator, optimizer, 3)
    assert integrator.adaptations == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 1.0}, r"tau=1.0 must lie in \[0, 1\)"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"budget": 0}, "budget=0"),
        ({"budget": 10.5}, "budget=10.5"),
        ({"budget": 59}, "budget=59 is below the floor of 60 parameters that min_rank asks for"),
        ({"min_rank": -1}, "min_rank=-1"),
        ({"min_rank": 7}, "min_rank=7 is above the largest max_rank, 6"),
        ({"adapt_every": 0}, "adapt_every=0"),
        ({"adapt_every": 1.5}, "adapt_every=1.5"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        two_shapes(**settings)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters: inject_adapters"):
        RankAdaptiveIntegrator(nn.Linear(2, 2))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("on_nonfinite", "waits"), [("skip", False), ("raise", True)])
def test_a_step_that_does_not_adapt_waits_for_no_device(monkeypatch, precision, on_nonfinite, waits):
    """Fake tensors have no values, so that whatever asks for one fails."""
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: True)
    # The cache would outlive the fake tensors; the ranks are read once, before the first step.
    monkeypatch.setattr(
        "geolora_pl.training.optim.owners", owners.__wrapped__
    )  # a cache that outlives the fake tensors
    monkeypatch.setattr(
        "geolora_pl.adapters.base.GeoLoRALayer.read_rank", lambda layer: None
    )  # once, before the first step
    with FakeTensorMode():
        model, _, integrator = two_shapes(adapt_every=3, on_nonfinite=on_nonfinite)
        integrator.total_steps = 100  # in the middle of a run: the first retractions come sooner
        optimizer = RiemannianAdam(model, weight_decay=0.1)

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = model(torch.randn(16, 8)).float().square().mean()
            loss.backward()
            optimizer.step()
            return integrator.step(optimizer)

        if not waits:
            assert not step()
            assert not step()
        with pytest.raises(DataDependentOutputException):
            step()


@pytest.mark.parametrize("geometry", ["rowwise", "isotropic", "spectral", "entrywise"])
@pytest.mark.parametrize("place", ["adapter", "head"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.float64), (1e25, torch.float32), (1e200, torch.float64)],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_skipped_on_the_device_leaves_everything_as_it_is(monkeypatch, geometry, place, value, first, dtype):
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: True)
    model, adapters, integrator = two_shapes(adapt_every=2)
    integrator.total_steps = 100  # in the middle of a run: the first retractions come sooner
    model.to(dtype)
    optimizer = RiemannianAdam(model, lr=0.1, weight_decay=0.1, geometry=geometry)
    if not first:
        train(model, integrator, optimizer, 1)
    before = snapshot(model, optimizer)
    backward(model, 99)
    (adapters["2"].K if place == "adapter" else model[5].weight).grad[0, 0] = value
    optimizer.step()
    if first:
        assert not integrator.step(optimizer)
    else:
        with pytest.warns(GeoLoRAWarning, match="1 optimizer steps were skipped whole"):
            assert not integrator.step(optimizer), "a step that was skipped does not count"
    after = snapshot(model, optimizer)
    with pytest.warns(GeoLoRAWarning) if first else contextlib.nullcontext():
        state = integrator.state_dict()
    assert state["decay"] == dict.fromkeys(adapters, 1.0 if first else pytest.approx(0.99))
    if first:  # there is a state now, of zeros
        assert not any(value.any() for value in after[len(before) :])
    assert_same(after[: len(before)], before)
    train(model, integrator, optimizer, 2)
    assert integrator.skipped_steps == 1
    assert integrator.total_steps == (102 if first else 103)


@pytest.mark.parametrize(("dtype", "skipped"), [(torch.float32, 1), (torch.float64, 0)])
@pytest.mark.parametrize("others", [torch.float32, torch.float64])
def test_the_limit_of_a_gradient_is_that_of_its_own_precision(dtype, skipped, others):
    """The square of 1e25 is finite in float64 and not in float32, whatever the other parameters are of."""
    model, _, integrator = two_shapes()
    backward(model.to(others))
    number = nn.Parameter(torch.zeros(1, dtype=dtype))  # the norm of one number is found without its square
    number.grad = torch.full_like(number, 1e25)
    optimizer = torch.optim.SGD([*(p for p in model.parameters() if p.requires_grad), number], lr=1e-30)
    with pytest.warns(GeoLoRAWarning, match="is so large") if skipped else contextlib.nullcontext():
        optimizer.step()
    assert integrator.skipped_steps == skipped


def test_steps_skipped_on_the_device_before_a_state_is_loaded_are_not_taken_from_it(monkeypatch):
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: True)
    model, adapters, integrator = two_shapes(adapt_every=5)
    integrator.total_steps = 100  # in the middle of a run: the first retractions come sooner
    optimizer = RiemannianAdam(model)
    state = integrator.state_dict()
    backward(model)
    adapters["0"].K.grad[0, 0] = float("nan")
    optimizer.step()
    integrator.step(optimizer)
    integrator.load_state_dict(state)
    assert integrator.state_dict() == state


def test_ranks_are_those_of_the_factors_that_were_written_to():
    """As by a wrapper that sends parameters from another process."""
    _, source, _ = one_layer(40, 30, 12, 16)
    model, target, _ = one_layer(40, 30, 4, 16)
    with torch.no_grad():
        source.S[:12, :12] = torch.eye(12)
        for a, b in zip(target.parameters(recurse=False), source.parameters(recurse=False), strict=True):
            a.copy_(b)
    RankAdaptiveIntegrator(model)
    assert target.rank == 12
    close(target.delta_weight(), source.delta_weight())


def test_a_step_and_a_retraction_inside_autocast_are_those_outside():
    runs = []
    for inside in (False, True):
        torch.manual_seed(0)
        model, _, integrator = two_shapes()
        optimizer = RiemannianAdam(model, lr=0.1)
        for t in range(3):
            backward(model, t)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
                integrator.step(optimizer)
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize(("probes", "tau"), [(0, 0.035), (2, 0.2)])
def test_the_room_for_columns_changes_nothing_but_the_room(probes, tau):
    """With more columns than the ranks ever need, a run is the same; and so it is when ranks cross a multiple of 8."""
    runs = []
    for max_rank in (16, 24, 40):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40)).double()
        config = AdapterConfig(init_rank=3, max_rank=max_rank, target_modules=["0", "2"], probes=probes)
        adapters, filled = inject_adapters(model, config), probes + 3
        for adapter in adapters.values():
            generator = torch.Generator().manual_seed(adapter.in_features)
            with torch.no_grad():
                for basis in (adapter.U, adapter.V):
                    gaussian = torch.randn(len(basis), filled, generator=generator).double()
                    basis[:, :filled] = torch.linalg.qr(gaussian).Q
        integrator = RankAdaptiveIntegrator(model, tau=tau, adapt_every=2)
        optimizer = RiemannianAdam(model, lr=1.0)
        ranks = [list(integrator.ranks().values())]
        for t in range(14):
            generator = torch.Generator().manual_seed(t)
            x = torch.randn(64, 40, generator=generator).double()
            optimizer.zero_grad()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
            integrator.step(optimizer)
            ranks.append(list(integrator.ranks().values()))
        runs.append((ranks, [adapter.delta_weight().detach() for adapter in adapters.values()]))
    lowest, highest = min(map(min, runs[0][0])), max(map(max, runs[0][0]))
    assert lowest <= 8 < highest < 16
    for ranks, updates in runs[1:]:
        assert ranks == runs[0][0]
        for a, b in zip(updates, runs[0][1], strict=True):
            close(a, b, within=RUN)


@pytest.mark.parametrize("probes", [0, 2])
def test_min_rank_may_ask_for_more_columns_than_are_live(probes):
    _, adapter, integrator = one_layer(40, 30, 2, 24, min_rank=20, probes=probes)
    with torch.no_grad():
        adapter.K[:, : probes + 2].normal_()
    integrator.retract()
    assert adapter.rank == 20
    for basis in (adapter.U, adapter.V):
        assert is_orthonormal(basis)


def test_a_retraction_uses_one_thread_and_gives_the_others_back(monkeypatch):
    """On a busy machine two threads that wait for each other made an event of thin matrices many times as long."""
    seen = []
    plan = integrator_module.plan_retraction

    def seeing(*args):
        seen.append(torch.get_num_threads())
        return plan(*args)

    monkeypatch.setattr(integrator_module, "plan_retraction", seeing)
    _, adapter, integrator = one_layer(6, 5, 1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            adapter.K.fill_(1.0)
        integrator.retract()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]
