"""The networks of the generated tasks compute what they say."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from rlsched.envs.networks import MLP, ConvNet, Dropout, NoisyQuadratic, Recurrent, Transformer, TwoHeads

# --- Dropout --------------------------------------------------------------------------------------------------------


def test_dropout_rate_is_zero_in_half_of_the_networks():
    """A policy has to meet both networks with dropout and networks without."""
    rates = torch.stack([Dropout(0.4).rate for _ in range(1000)])
    assert (rates == 0).float().mean() == pytest.approx(0.5, abs=0.06)
    positive = rates[rates > 0]
    assert positive.max() < 0.4
    torch.testing.assert_close(
        torch.histc(positive, 4, 0, 0.4) / len(positive), torch.full((4,), 0.25), atol=0.06, rtol=0
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_dropout_keeps_the_mean_and_drops_its_share(rate):
    """A mean that moves with the rate would be another network at validation than in training."""
    dropout, x = Dropout(0.95), torch.ones(100_000)
    dropout.rate.fill_(rate)
    y = dropout(x)
    assert (y == 0).float().mean() == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(y[y > 0].unique(), torch.tensor([1 / (1 - rate)]))
    assert y.mean() == pytest.approx(1, abs=0.03)
    assert dropout.eval()(x) is x


# --- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_perceptron_is_its_layers(activation):
    """An option that is accepted and then ignored would make two families of one."""
    network = MLP(5, (7, 6), 3, activation=activation, layer_norm=True)
    x = torch.randn(4, 5)
    norms, layers = ([m for m in network if isinstance(m, kind)] for kind in (nn.LayerNorm, nn.Linear))
    expected = x
    for norm, layer in zip(norms, layers, strict=False):
        expected = getattr(functional if activation == "gelu" else torch, activation)(norm(layer(expected)))
    torch.testing.assert_close(network(x), layers[-1](expected))
    assert [layer.weight.shape for layer in layers] == [(7, 5), (6, 7), (3, 6)]
    assert len(norms) == 2
    assert not [m for m in network if isinstance(m, Dropout)]


def test_perceptron_drops_out_after_every_activation():
    """Dropout in one layer only would be a weaker regularisation than the option says."""
    kinds = [type(m) for m in MLP(5, (7, 6), 3, dropout=0.4)]
    assert kinds == [nn.Linear, nn.ReLU, Dropout, nn.Linear, nn.ReLU, Dropout, nn.Linear]


def test_perceptron_weights_are_he_normal():
    """Weights of another size would move the learning rates that work, and the gain's range with them."""
    for layer in (m for m in MLP(400, (300,), 200) if isinstance(m, nn.Linear)):
        weight = layer.weight.detach()
        assert weight.std() == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.02)
        assert weight.mean() == pytest.approx(0, abs=1e-3)
        assert not layer.bias.any()


def test_two_heads_share_their_trunk():
    """Two separate networks would be two tasks, not one with two losses."""
    network, x = TwoHeads(5, (8, 6), 4, activation="tanh"), torch.randn(3, 5)
    first, second = (m for m in network.trunk.modules() if isinstance(m, nn.Linear))
    hidden = second(first(x).tanh()).tanh()
    outputs = network(x)
    torch.testing.assert_close(outputs[:, :4], network.classify(hidden))
    torch.testing.assert_close(outputs[:, 4:], network.predict(hidden))
    assert TwoHeads(5, (8,), 4)(x).shape == (3, 5)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("size", [8, 7, 5])
def test_convolutions_halve_the_image(size, batch_norm):
    """A network for images has to fit images of any size."""
    network = ConvNet(3, size, (4, 6), 10, batch_norm=batch_norm)
    assert network(torch.randn(2, 3, size, size)).shape == (2, 10)
    convolutions = [m for m in network if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(3, 4), (4, 6)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network) == 2 * batch_norm
    assert network[-1].in_features == 6 * math.ceil(math.ceil(size / 2) / 2) ** 2


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm", "transformer"])
def test_language_models_read_the_past_alone(kind):
    """A network that sees the next token has nothing to learn; one that forgets the first cannot learn to copy."""
    network = Transformer(7, 5, 8, layers=2) if kind == "transformer" else Recurrent(7, 6, cell=kind)
    embedded = []
    network.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    outputs = network(torch.randint(7, (1, 5)))[0]
    # How much each position's output depends on each position's token.
    grads = [torch.autograd.grad(out.square().sum(), embedded, retain_graph=True)[0][0] for out in outputs]
    sizes = torch.stack(grads).abs().sum(-1)
    assert torch.equal(sizes > 0, torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_recurrent_cell_is_the_one_of_its_name(cell):
    """An option that is accepted and then ignored would make two families of one."""
    assert type(Recurrent(7, 6, cell=cell).cell).__name__ == cell.upper()


def test_transformer_attention_is_torchs():
    """Attention that is written out for speed must not be another one."""
    network, x = Transformer(7, 5, 8, heads=4), torch.randint(7, (3, 5))
    (block,) = network.blocks
    h = network.embedding(x) + network.position
    q, k, v = block.qkv(block.attention_norm(h)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in (q, k, v))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    h = h + block.out(attended.transpose(1, 2).flatten(2))
    h = h + block.mlp(block.mlp_norm(h))
    torch.testing.assert_close(network(x), network.head(network.norm(h)))
    assert not torch.equal(network(x[:, :1].expand(3, 5))[:, 0], network(x[:, :1].expand(3, 5))[:, 1]), "positions"


# --- The quadratic --------------------------------------------------------------------------------------------------


def test_quadratic_has_the_spectrum_that_it_says():
    """The closed form of the expected loss is what makes the quadratic a known ground."""
    network = NoisyQuadratic(6, exponent=(1.5, 1.5)).requires_grad_(False)
    h = torch.arange(1, 7) ** -1.5
    h = h / h.sum()
    hessian = torch.autograd.functional.hessian(
        lambda p: torch.func.functional_call(network, {"position": p}, torch.zeros(1, 6)).sum(), network.position
    )[0, :, 0]
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian).flip(0), h)
    assert (hessian - hessian.diag().diag()).abs().max() > 0.01, "rotated"
    # E ½ Σ h (Rθ − x)² = ½ θᵀHθ + ½ σ² for noise of deviation σ, since Σ h = 1.
    position, noise = network.position[0], 0.5 * torch.randn(200_000, 6)
    expected = position @ hessian @ position / 2 + 0.5**2 / 2
    assert network(noise).sum(-1).mean() == pytest.approx(expected.item(), rel=0.01)


def test_quadratics_differ_in_their_exponent_and_rotation():
    """One quadratic for all episodes would be one condition number for all of them."""
    many = [NoisyQuadratic(8, exponent=(0.5, 2.0)) for _ in range(50)]
    exponents = torch.stack([2 * (q.root[0] / q.root[1]).log2() for q in many])
    assert exponents.min() == pytest.approx(0.5, abs=0.15) and exponents.max() == pytest.approx(2, abs=0.15)
    assert not torch.equal(many[0].rotation, many[1].rotation)
    torch.testing.assert_close(many[0].rotation @ many[0].rotation.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MLP(4, (8, 0), 2), "inputs, hidden and outputs"),
        (lambda: MLP(0, (8,), 2), "inputs, hidden and outputs"),
        (lambda: MLP(4, (8,), 2, activation="swish"), "activation"),
        (lambda: MLP(4, (8,), 2, dropout=1.0), "dropout"),
        (lambda: MLP(4, (8,), 2, dropout=-0.1), "dropout"),
        (lambda: Recurrent(4, 8, cell="transformer"), "cell"),
    ],
)
def test_wrong_configuration_is_named(make, field):
    """A width of zero would train nothing and say nothing."""
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        make()
