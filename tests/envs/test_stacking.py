"""N networks in a stack are the N networks, whatever module the user has; and what cannot be one is refused by name."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from rlsched.envs import FAMILIES
from rlsched.envs.draws import seeded
from rlsched.envs.mixtures import digits
from rlsched.envs.networks import MLP, Dropout
from rlsched.envs.stacking import Stack

NETWORKS, BATCH = 3, 8


class Batch:
    """Networks of one factory, with a mini-batch of inputs (networks, batch, *shape) and targets for each."""

    def __init__(self, make, inputs=None, targets=None, loss=cross_entropy):
        self.inputs = torch.randn(NETWORKS, BATCH, 4) if inputs is None else inputs
        self.targets = torch.randint(3, (NETWORKS, BATCH)) if targets is None else targets
        self.loss = loss
        self.networks = [make() for _ in range(NETWORKS)]
        self.stack = Stack(make(), loss, self.inputs[0], self.targets[0])
        params, buffers = zip(*map(self.stack.flatten, self.networks), strict=True)
        self.params = torch.stack(params)
        self.buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}

    def gradient(self, scale=None):
        """Of the stack: gradients, losses and changed buffers."""
        scale = torch.ones(NETWORKS) if scale is None else scale
        return self.stack.gradient(self.params, self.buffers, self.inputs, self.targets, scale)

    def evaluate(self):
        """Of the stack."""
        with torch.no_grad():
            return self.stack.evaluate(self.params, self.buffers, self.inputs, self.targets)

    def assert_same_as_alone(self, steps=2):
        """Losses, gradients, what the networks remember, and the evaluation are those of each network by itself."""
        scale = torch.tensor([0.5, 1.0, 4.0])
        alone = deepcopy(self.networks)
        for step in range(steps):
            self.inputs = self.inputs.roll(step, 0)
            gradients, losses, changed = self.gradient(scale)
            assert not any(t.requires_grad for t in (gradients, losses, *changed.values()))
            self.buffers |= changed
            evaluated = self.evaluate()
            for i, network in enumerate(alone):
                network.train().zero_grad()
                loss = scale[i] * self.loss(network(self.inputs[i]), self.targets[i])
                loss.backward()
                trained = [p for p in network.parameters() if p.requires_grad]
                close(gradients[i], parameters_to_vector([p.grad for p in trained]))
                close(losses[i], loss.detach())
                remembered = {name: b for name, b in self.buffers.items() if name in dict(network.named_buffers())}
                close({name: b[i] for name, b in remembered.items()}, dict(network.named_buffers()))
                with torch.no_grad():
                    close(evaluated[i], self.loss(deepcopy(network).eval()(self.inputs[i]), self.targets[i]))


def close(one, other):
    """Equal but for rounding."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- Batched equals single ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "digits"])
def test_family_is_batched_and_equals_its_networks_alone(name):
    """Every policy is trained on these gradients: a wrong one would teach it a training that nobody has."""
    task = {**FAMILIES, "digits": digits()}[name]
    points = task.source.draw(np.random.default_rng(0))
    rows = torch.randint(len(points.inputs), (NETWORKS, BATCH))

    def without_dropout():
        network = task.network()
        for module in network.modules():
            if isinstance(module, Dropout):
                module.rate.zero_()
        return network

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Batch(without_dropout, points.inputs[rows], points.targets[rows], task.loss)
        assert not batch.stack.looped
        batch.assert_same_as_alone()


class Sequence(nn.Module):
    """A recurrent classifier of sequences."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attending(nn.Module):
    """torch's own transformer layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


class SharedScale(nn.Module):
    """One random buffer in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        scale = torch.rand(4)
        self.first.register_buffer("scale", scale)
        self.second.register_buffer("scale", scale)

    def forward(self, x):
        return self.second(self.first(x * self.first.scale) * self.second.scale)


class Frozen(nn.Module):
    """A random layer that does not train."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x).tanh())


class Averaging(nn.Module):
    """Centres its inputs with a running average, which it replaces at every step."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.head(x - self.average)


class Counting(nn.Module):
    """Counts its calls in place, in training and in evaluation; the count matters."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(x) * self.calls


def shared_norm():
    """One batch norm in two places."""
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 3))


def image_network(dropout=0.0):
    """What a user's first network looks like."""
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers)


IMAGES = (NETWORKS, BATCH, 1, 6, 6)
SEQUENCES = (NETWORKS, BATCH, 5, 4)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (image_network, IMAGES),
        (lambda: Sequence(nn.GRU), SEQUENCES),
        (lambda: Sequence(nn.RNN), SEQUENCES),
        (shared_norm, None),
        (Tied, None),
        (SharedScale, None),
        (Frozen, None),
        (Averaging, None),
        (Counting, None),
    ],
    ids=["images", "GRU", "RNN", "shared norm", "tied", "shared buffer", "frozen", "averaging", "counting"],
)
def test_users_module_is_batched_and_equals_its_networks_alone(make, shape):
    """A user's module must train as it would on its own, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Batch(make, None if shape is None else torch.randn(shape))
        assert not batch.stack.looped
        batch.assert_same_as_alone()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of an operation that it does not batch
@pytest.mark.parametrize("make", [lambda: Sequence(nn.LSTM), Attending], ids=["LSTM", "attention"])
def test_fused_kernels_are_batched_and_equal_their_networks_alone(make):
    """The commonest layers must not fall back to the loop over networks."""
    batch = Batch(make, torch.randn(SEQUENCES))
    assert not batch.stack.looped
    batch.assert_same_as_alone()


def test_stack_of_one_is_the_network():
    """The single environment goes another way than the batched one, and must arrive at the same numbers."""
    batch = Batch(image_network, torch.randn(IMAGES))
    gradients, losses, changed = batch.gradient()
    values = batch.evaluate()
    for i in range(NETWORKS):
        one = batch.params[i : i + 1], {name: b[i : i + 1] for name, b in batch.buffers.items()}
        one = (*one, batch.inputs[i : i + 1], batch.targets[i : i + 1])
        gradient, loss, changes = batch.stack.gradient(*one, torch.ones(1))
        close(gradient[0], gradients[i])
        close(loss[0], losses[i])
        close({n: b[0] for n, b in changes.items()}, {n: b[i] for n, b in changed.items()})
        close(batch.stack.evaluate(*one)[0], values[i])


# --- What a stack keeps apart ---------------------------------------------------------------------------------------


def test_flatten_scales_the_matrices_alone():
    """A gain on biases and norms would change networks in a way that no initialisation does."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    for p in network.parameters():
        nn.init.uniform_(p)
    network[3].requires_grad_(False)
    stack = Stack(network, cross_entropy, torch.randn(5, 1, 3, 3), torch.randint(3, (5,)))
    params, buffers = stack.flatten(network, 3.0)
    conv, norm, _, linear = network
    expected = [3 * conv.weight, conv.bias, norm.weight, norm.bias]
    assert torch.equal(params, parameters_to_vector(expected)) and not params.requires_grad
    assert stack.parameters == len(params)
    assert set(buffers) == {"3.weight", "3.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert torch.equal(buffers["3.weight"], linear.weight)


def test_only_what_changes_is_returned():
    """Frozen weights that come back as changed would be copied at every step of every network."""
    assert Batch(Frozen).gradient()[2] == {}
    assert set(Batch(image_network, torch.randn(IMAGES)).gradient()[2]) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


@pytest.mark.parametrize("make", [Counting, lambda: MLP(4, (5,), 3, dropout=0.5), Averaging], ids=range(3))
def test_nothing_is_changed_in_place(make):
    """A validation that moves a network's buffers would change the training that it measures."""
    batch = Batch(make)
    before = batch.params.clone(), {name: b.clone() for name, b in batch.buffers.items()}
    batch.gradient()
    batch.evaluate()
    assert torch.equal(batch.params, before[0])
    assert all(torch.equal(batch.buffers[name], b) for name, b in before[1].items())


@pytest.mark.parametrize("make", [lambda: MLP(4, (64,), 3, dropout=0.5), lambda: dropout_network(0.5)], ids=range(2))
def test_every_network_drops_out_by_itself(make):
    """One mask for all networks would tie episodes that are meant to be independent."""
    batch = Batch(make, torch.randn(1, BATCH, 4).expand(NETWORKS, -1, -1), torch.zeros(NETWORKS, BATCH).long())
    batch.params = batch.params[:1].expand(NETWORKS, -1)
    batch.buffers = {name: torch.full_like(b, 0.5) for name, b in batch.buffers.items()}
    with seeded(1):
        first = batch.gradient()
    with seeded(1):
        again = batch.gradient()
    with seeded(2):
        other = batch.gradient()
    assert torch.equal(first[0], again[0]), "the same numbers give the same masks"
    assert not torch.equal(first[0], other[0])
    assert len(first[1].unique()) == NETWORKS
    values = batch.evaluate()
    assert (values == values[0]).all(), "and none in evaluation"


def dropout_network(rate):
    """torch's own dropout."""
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(rate), nn.Linear(64, 3))


def test_users_network_with_dropout_and_batch_norm_is_batched():
    """The commonest network of all must not fall back to the loop, nor warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Batch(lambda: image_network(0.5), torch.randn(IMAGES))
        without = Batch(image_network, batch.inputs, batch.targets)
        without.params, without.buffers = batch.params, batch.buffers
        gradients, losses, remembered = batch.gradient()
        expected_gradients, expected_losses, expected_remembered = without.gradient()
        close(batch.evaluate(), without.evaluate())
    assert not batch.stack.looped
    close(remembered, expected_remembered)  # the norm comes before the dropout
    assert (losses != expected_losses).all() and (gradients != expected_gradients).any(1).all()


# --- What cannot be stacked -----------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A network with a buffer, and a branch that leaves everything as it is."""

    def __init__(self, branch):
        super().__init__()
        self.norm, self.head, self.branch = nn.BatchNorm1d(4), nn.Linear(4, 3), branch

    def forward(self, x):
        x = self.norm(x)
        if self.branch and x.sum().item() > 1e9:
            x = torch.zeros_like(x)
        return self.head(x)


def test_branching_network_is_trained_one_by_one():
    """A module that vmap refuses must still train, by the same numbers, and the user must hear why it is slow."""
    with pytest.warns(UserWarning, match=r"^the Branching cannot be trained in a stack.*one by one.*\.item\(\)"):
        looped = Batch(lambda: Branching(True))
    assert looped.stack.looped
    looped.assert_same_as_alone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched = Batch(lambda: Branching(False), looped.inputs, looped.targets)
    assert not batched.stack.looped
    batched.params, batched.buffers = looped.params, looped.buffers
    for one, other in zip(batched.gradient(), looped.gradient(), strict=True):
        close(one, other)
    close(batched.evaluate(), looped.evaluate())


class Late(nn.Module):
    """Changes a buffer in a branch that the first steps do not take."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x):
        if x.abs().amax().item() > 100:
            self.centre += x.mean(0)
        return self.head(x - self.centre)


def test_buffer_that_changes_late_is_tracked():
    """A change that the first trial did not show would be lost, or would leak from network to network."""
    with pytest.warns(UserWarning, match="one by one"):
        batch = Batch(Late)
    batch.inputs = torch.stack([batch.inputs[0], 1000 * batch.inputs[1], batch.inputs[2]])
    changed = batch.gradient()[2]["centre"]
    close(changed[1], batch.inputs[1].mean(0))
    assert not batch.buffers["centre"].any() and not changed[::2].any()


class Silent(nn.Module):
    """Fails in a stack without a word."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        try:
            x.sum().item()
        except RuntimeError:
            raise RuntimeError from None
        return self.head(x)


def test_reason_of_an_error_without_a_message_is_its_name():
    """An error without a message must not become another one in the text of the warning."""
    with pytest.warns(UserWarning, match="The reason: RuntimeError$"):
        batch = Batch(Silent)
    batch.assert_same_as_alone()


class Logging(nn.Module):
    """Sums up what it has seen in a plain tensor, in place, which vmap refuses; nothing depends on it."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(4, 3), torch.zeros(())

    def forward(self, x):
        self.seen += self.head(x).detach().sum()
        return self.head(x)


def test_network_with_state_in_place_is_trained_one_by_one():
    """State that vmap refuses must not stop a user's training."""
    with pytest.warns(UserWarning, match="the Logging cannot be trained in a stack.*in-place"):
        batch = Batch(Logging)
    batch.assert_same_as_alone()


class Remembering(nn.Module):
    """Adds its last outputs to the next, from a plain tensor."""

    def __init__(self):
        super().__init__()
        self.head, self.last = nn.Linear(4, 3), torch.zeros(3)

    def forward(self, x):
        outputs = self.head(x) + self.last
        self.last = outputs.mean(0).detach()
        return outputs


def test_memory_outside_of_buffers_is_refused():
    """What a module keeps in plain attributes would pass from one network to the next."""
    with pytest.raises(ValueError, match=r"^network must keep what it remembers in buffers"):
        Batch(Remembering)


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"), r"a tensor of shape \(8,\)"),
        (lambda outputs, targets: cross_entropy(outputs, targets)[None], r"a tensor of shape \(1,\)"),
        (lambda outputs, targets: cross_entropy(outputs, targets).item(), "float"),
        (lambda outputs, targets: None, "NoneType"),
    ],
    ids=["vector", "one-vector", "float", "None"],
)
def test_loss_that_is_not_one_number_is_refused(loss, given):
    """A vector of losses would be summed over the stack, and nobody would know which network it came from."""
    with pytest.raises(ValueError, match=f"^loss must return one number per network.* returned {given}"):
        Batch(lambda: nn.Linear(4, 3), loss=loss)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (nn.Flatten, "none"),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "none"),
        (lambda: nn.Linear(4, 3).double(), "torch.float64"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).half()), "torch.float16.*torch.float32"),
    ],
    ids=["no weights", "frozen", "float64", "mixed"],
)
def test_network_without_trainable_floats_is_refused(make, given):
    """Weights that are cast or left out silently would be another network than the user's."""
    with pytest.raises(ValueError, match=f"^network must have trainable weights, of torch.float32; it has .*{given}"):
        Batch(make)


def test_users_own_mistake_surfaces_as_it_is():
    """An error of the module itself must not be taken for one of stacking, and trained around."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Batch(lambda: nn.Linear(5, 3))
    with pytest.raises(IndexError, match="Target 2 is out of bounds"):
        Batch(lambda: nn.Linear(4, 2), targets=torch.full((NETWORKS, BATCH), 2))


def test_loss_may_be_the_users_own():
    """A loss from outside of torch must reach every network with its own targets."""

    def loss(outputs, targets):
        return (functional.log_softmax(outputs, -1) * targets).sum(-1).mean().neg()

    Batch(lambda: nn.Linear(4, 3), targets=torch.rand(NETWORKS, BATCH, 3), loss=loss).assert_same_as_alone()
