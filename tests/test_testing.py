"""The checks for kinds of layers and optimizers of one's own: ours and torch's pass, and mistakes are found."""

import pytest
import timm.optim
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from geolora_pl import GeoLoRALayer, GeoLoRALinear, GeoLoRAWarning, RiemannianAdam
from geolora_pl.adapters.kinds import GeoLoRAConv1D, GeoLoRAConv2d, GeoLoRAEmbedding
from geolora_pl.testing import check_adapter, check_optimizer

VECTORS, IMAGES = torch.randn(3, 7), torch.randn(3, 4, 9, 8)
SETTINGS = {"stride": 2, "padding": 1, "dilation": (1, 2), "padding_mode": "reflect"}
KINDS = [
    (GeoLoRALinear, nn.Linear(7, 6), VECTORS),
    (GeoLoRALinear, nn.Linear(7, 6, bias=False), torch.randn(3, 2, 7)),
    (GeoLoRALinear, nn.Linear(1, 6), VECTORS[:, :1]),
    (GeoLoRALinear, nn.Linear(7, 6, dtype=torch.bfloat16), VECTORS.bfloat16()),
    (GeoLoRAConv1D, Conv1D(6, 7), VECTORS),
    (GeoLoRAConv2d, nn.Conv2d(4, 6, (3, 2), groups=2), IMAGES),
    (GeoLoRAConv2d, nn.Conv2d(4, 6, 3, **SETTINGS), IMAGES),
    (GeoLoRAEmbedding, nn.Embedding(11, 6), torch.tensor([[1, 2], [7, 10], [3, 3]])),
    (GeoLoRAEmbedding, nn.Embedding(11, 6, padding_idx=2), torch.tensor([[1, 2], [7, 10], [3, 3]])),
]


@pytest.mark.parametrize(("kind", "layer", "inputs"), KINDS)
def test_our_kinds_keep_the_contract(kind, layer, inputs):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    check_adapter(kind, layer, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Transposed(GeoLoRALinear):
    def from_matrix(self, matrix):
        return matrix.mT


class NotZero(GeoLoRALinear):
    def forward(self, x):
        return super().forward(x) + 1e-6


class TwiceTheUpdate(GeoLoRALayer):
    def apply_update(self, x, A, B):
        return 2 * super().apply_update(x, A, B)


class Detached(GeoLoRALayer):
    def apply_update(self, x, A, B):
        return super().apply_update(x, A.detach() + 0.5 * (A - A.detach()), B)


class WholeBatch(GeoLoRALayer):
    def apply_update(self, x, A, B):
        update = super().apply_update(x, A, B)
        return update + (update.mean(0) - update.mean(0).detach())


class Forgetful(GeoLoRALinear):
    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        rank = self.rank
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.rank = rank


MISTAKES = [
    (NotZero, "a new adapter changes the output"),
    (Transposed, "from_matrix makes"),
    (TwiceTheUpdate, "apply_update does not add"),
    (Detached, "the gradient of K is not that of the output"),
    (WholeBatch, "the gradient of K is not that of the output"),
    (Forgetful, "a state dict of rank 2 is loaded as rank 1"),
]


@pytest.mark.parametrize(("kind", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake_of_an_adapter_is_found(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_adapter(kind, nn.Linear(7, 6), VECTORS)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=10.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1.0, eps=(None, 0.1)),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.02),
    "RMSprop of TensorFlow": lambda p: timm.optim.RMSpropTF(p, lr=0.01),
    "AdaBelief": lambda p: timm.optim.AdaBelief(p, lr=0.02, rectify=False),
    "Lion": lambda p: timm.optim.Lion(p, lr=0.01),
    "RiemannianAdam": lambda p: RiemannianAdam(p, lr=0.1),
    "isotropic": lambda p: RiemannianAdam(p, lr=0.1, geometry="isotropic"),
    "spectral": lambda p: RiemannianAdam(p, lr=0.1, geometry="spectral"),
    "entrywise": lambda p: RiemannianAdam(p, lr=0.1, geometry="entrywise"),
}


@pytest.mark.parametrize("factory", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_keep_the_contract(factory):
    state = torch.get_rng_state()
    check_optimizer(factory)  # a warning of state without a rule would be an error
    assert torch.equal(torch.get_rng_state(), state)


class ForgetsItsDenominator(torch.optim.Adagrad):
    """It keeps what it divides by under a sign, so that nobody can know what it is."""

    def step(self, closure=None):
        for state in self.state.values():
            state["sum"] = -state.pop("negative") if "negative" in state else state["sum"]
        loss = super().step(closure)
        for state in self.state.values():
            state["negative"] = -state.pop("sum")
        return loss


class Stateless(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=0.02)
        self.speed = {}

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.speed[p] = 0.9 * self.speed.get(p, 0) + p.grad
                p -= group["lr"] * self.speed[p]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda p: ForgetsItsDenominator(p, lr=0.05), "the step after the retraction at step .* times as long"),
        (Stateless, "does not go on from its state dict"),
        (lambda p: torch.optim.SGD(p, lr=0.0), "40 steps take the loss from"),
    ],
)
@pytest.mark.filterwarnings("ignore:the optimizer's state negative has no known rule")
def test_a_mistake_of_an_optimizer_is_found(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_optimizer(factory)


def test_what_the_integrator_refuses_is_refused():
    with pytest.raises(ValueError, match="LBFGS keeps a history"):
        check_optimizer(lambda p: torch.optim.LBFGS(p))
    with pytest.raises(ValueError, match="does not hold the factors"):
        check_optimizer(lambda p: torch.optim.SGD(p[:2], lr=0.1))
    with pytest.warns(GeoLoRAWarning, match="state ax has no known rule"):
        check_optimizer(lambda p: torch.optim.ASGD(p, lr=0.05))
