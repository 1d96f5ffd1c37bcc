"""The batched inner training is that of torch.optim."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from replay import replay
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR

from rlsched import schedule
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import base_values
from rlsched.envs.networks import ConvNet, Dropout, Recurrent
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sequences import Markov
from rlsched.envs.sources import Images, Points
from rlsched.envs.stored import Stored
from rlsched.envs.tasks import InnerTask, SetupDistribution, next_token_loss
from rlsched.envs.training import InnerTraining

RUNS, WINDOWS = 6, 3
SEED = 16  # of the first run
RATES = {
    "decisions": (WINDOWS, WINDOWS),
    "sgd_lr": (1e-2, 3e-2),
    "adaptive_lr": (3e-3, 1e-2),
    "weight_decay": (0.1, 0.2),
    "other_momentum": 0.5,
}
EVERY = dict.fromkeys(OPTIMIZERS, 1)


SEQUENCES = InnerTask(
    partial(Recurrent, 5, 4),
    Markov(points=(32, 64), validation_points=16, tokens=5, length=6),
    next_token_loss,
    batch_size=8,
    interval=4,
    setup=SetupDistribution(optimizers=EVERY, **RATES),
)


def normed(noise=nn.Identity):
    """A perceptron with buffers that training changes, and with a layer of noise."""
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), noise(), nn.Linear(8, 3))


NOISY = partial(normed, partial(nn.Dropout, 0.5))


def of_ones(layer):
    """A layer whose weights are all 1, so that networks differ in nothing but their noise."""
    for p in layer.parameters():
        nn.init.ones_(p)
    return layer


def begun(task, runs=RUNS, seed=SEED, **options):
    """Networks at the start of their episodes."""
    training = InnerTraining(task, runs, **options)
    training.begin(list(range(runs)), [np.random.default_rng(seed + run) for run in range(runs)])
    return training


def base_schedule(training, done, steps):
    """The hyperparameters of the next `steps` inner steps without a policy, after `done` steps (networks,)."""
    group, run = training.group(), training.run()
    base = {**group, **base_values(group)}
    clock = done + torch.arange(steps, device=training.device)[:, None]
    return schedule.values(run, schedule.begin(run, base, probing=False), base, BASE_SCHEDULES["linear"], clock)


def first_step(training, slots):
    """The first inner step of some networks, under the base schedule."""
    done = torch.zeros(training.size, device=training.device)
    values = base_schedule(training, done, 1)
    return training.first_step(slots, {n: v[..., slots] for n, v in values.items()}, done[slots])


def windows(training, done):
    """`WINDOWS` windows of all networks under the base schedule, after `done` inner steps."""
    for _ in range(WINDOWS):
        yield training.window(base_schedule(training, done, training.task.interval), done)
        done = done + training.task.interval


def trained(task, runs=RUNS, **options):
    """Networks after their first step and `WINDOWS` windows, and the moments of all steps."""
    training = begun(task, runs, **options)
    steps = [first_step(training, list(range(runs)))]
    steps += windows(training, torch.ones(runs, device=training.device))
    return training, type(steps[0])(*(torch.cat(parts, -1) for parts in zip(*steps, strict=True)))


def everything(training):
    """All that belongs to each network; its data show in its next 40 mini-batches."""
    done = torch.full((training.size,), 13.0, device=training.device)
    batches = [[part.clone() for part in batch] for batch in training.minibatches(slice(None), 40, done)]
    seen = [torch.stack(parts, 1) for parts in zip(*batches, strict=True)]
    networks, buffers = training.networks[:-1], training.networks.buffers.values()
    return [*networks, *buffers, *training.settings, training.validation_loss(), *seen]


def assert_trains_like_torch(task, runs=RUNS):
    """The losses, weights, buffers and validation losses are those of a plain loop with torch.optim."""
    training, moments = trained(task, runs)
    losses = moments.loss / training.settings.loss_scale[:, None]
    for run in range(runs):
        episode = replay(task, SEED + run)
        weights = [p for p in episode.network.parameters() if p.requires_grad]
        start = parameters_to_vector(weights).detach().clone()
        optimizer, total = episode.optimizer(), episode.total_steps
        schedule = LambdaLR(optimizer, lambda n: 1 - n / total)  # noqa: B023
        expected = []
        for loss in episode.losses():
            optimizer.zero_grad()
            (episode.setup.loss_scale * loss).backward()
            optimizer.step()
            schedule.step()
            expected.append(loss.item())
        torch.testing.assert_close(losses[run], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        moved = training.networks.params[run] - start
        torch.testing.assert_close(moved, parameters_to_vector(weights).detach() - start, rtol=1e-3, atol=1e-5)
        assert moved.norm() > 1e-3 * start.norm(), "nothing was trained"
        for name, buffer in episode.network.named_buffers():
            torch.testing.assert_close(training.networks.buffers[name][run], buffer, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(training.validation_loss()[run], episode.validation_loss(), rtol=1e-4, atol=1e-5)
        assert abs(episode.setup.loss_scale - 1) > 0.01, "a loss scale that was forgotten would not be seen"
    assert (1 + WINDOWS * task.interval == training.settings.total_steps).all()
    return training.settings


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_inner_steps_are_those_of_torch_optim(make_task, optimizer):
    """An update that is not torch's would train policies for optimizers that nobody uses."""
    settings = assert_trains_like_torch(make_task(optimizers={optimizer: 1}, **RATES))
    assert settings.weight_decay.any() and not settings.weight_decay.all()
    if optimizer == "RMSprop":
        assert settings.momentum.any() and not settings.momentum.all()


def test_sgd_without_momentum_is_that_of_torch(make_task):
    """Its update has no average to correct; a factor that is meant for one would change the learning rate."""
    settings = assert_trains_like_torch(make_task(optimizers={"SGD": 1}, no_momentum=1, **RATES))
    assert not settings.momentum.any()


def test_optimizers_do_not_mix_in_one_stack(make_task):
    """The stack computes the terms of all its optimizers for every network; one too many is another optimizer."""
    settings = assert_trains_like_torch(make_task(optimizers=EVERY, **RATES), runs=16)
    assert len(set(settings.optimizer.tolist())) == len(OPTIMIZERS)


def test_small_batches_in_a_stack_of_large_ones(make_task):
    """A network that was to train on two points, and trains on eight, has less noise than its batch size says."""
    settings = assert_trains_like_torch(replace(make_task(optimizers=EVERY, **RATES), batch_size=(2, 8)), runs=8)
    assert set(settings.batch_size.tolist()) == {2, 4, 8}


def test_batch_norm_is_that_of_torch():
    """Running statistics that are shared, lost or not used in validation make a network that nobody trains."""
    task = InnerTask(
        partial(ConvNet, 1, 4, (3,), 3, batch_norm=True),
        Images(points=(32, 64), validation_points=16, classes=3, size=4),
        batch_size=8,
        interval=4,
        setup=SetupDistribution(optimizers=EVERY, **RATES),
    )
    assert_trains_like_torch(task)


def test_recurrent_network_is_that_of_torch():
    """Sequences that are inputs and targets in one go another way through the stack."""
    assert_trains_like_torch(SEQUENCES)


def test_stored_data_are_shared_and_train_like_torch(make_task):
    """A copy for each of a thousand networks would not fit; a wrong row would be another data set."""
    inputs, labels = torch.randn(100, 6), torch.randint(3, (100,))
    stored = replace(make_task(**RATES), data=Stored(inputs, labels, points=(30, 60)))
    settings = assert_trains_like_torch(stored)
    assert len(set(settings.points.tolist())) > 1
    held = {tensor.data_ptr() for tensor in InnerTraining(stored, 4)._pool.tensors()}
    assert {inputs.data_ptr(), labels.data_ptr()} <= held
    # A further network takes what it trains with and the numbers of its rows, and no points.
    few, many = (InnerTraining(stored, runs) for runs in (1, 11))
    weights = 6 * 8 + 8 + 8 * 3 + 3
    assert many.nbytes - few.nbytes == 10 * (_bytes_per_network(weights) + 4 * (60 + stored.source.validation_points))


def test_memory_is_what_is_held(make_task):
    """A run is sized by this number: one that leaves out the data ends in a killed process."""
    task, runs = replace(make_task(), network=normed), 5
    buffers = 4 * (8 + 8) + 8
    data = (64 + 16) * (4 * 6 + 8)  # float32 inputs, int64 labels
    weights = 6 * 8 + 2 * 8 + 8 * 3 + 3
    assert InnerTraining(task, runs).nbytes == runs * (_bytes_per_network(weights) + buffers + data)
    assert InnerTraining(SEQUENCES, runs).nbytes == runs * (
        _bytes_per_network(5 * 4 + 3 * 2 * (4 * 4 + 4) + 4 * 5 + 5) + (64 + 16) * 6 * 8  # inputs are targets
    )


def _bytes_per_network(weights):
    """Weights, last gradient and two averages; two norms; twelve settings of float32 and four of int64."""
    return 4 * 4 * weights + 2 * 4 + 12 * 4 + 4 * 8


def test_memory_of_a_view_is_that_of_its_tensor(make_task):
    """Targets that are a column of the inputs begin where the inputs begin, and must not count for both."""
    table = torch.randn(100, 6)
    task = replace(make_task(), network=partial(nn.Linear, 6, 1), loss=nn.functional.mse_loss)
    shared, copied = (
        InnerTraining(replace(task, data=(table, targets)), 2).nbytes
        for targets in (table[:, :1], table[:, :1].clone())
    )
    assert copied - shared == 4 * 100


def test_chunks_change_nothing(make_task, monkeypatch):
    """How many networks are trained at a time is for the cache to say, and must not be seen in any of them."""
    task = replace(make_task(optimizers=EVERY, **RATES), network=normed)
    whole, moments = trained(task, runs=7)
    monkeypatch.setattr("rlsched.envs.training.CHUNK_WEIGHTS", 1)
    monkeypatch.setattr("rlsched.envs.training.MIN_CHUNK", 2)
    parts, other = trained(task, runs=7)
    assert (len(whole._chunks), len(parts._chunks)) == (1, 4)
    for one, two in zip((*moments, *everything(whole)), (*other, *everything(parts)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_validation_is_in_evaluation_mode_and_without_the_loss_scale(make_task):
    """Dropout would make the reward a matter of chance, and the scale says nothing of how well a task is solved."""
    task = replace(make_task(**RATES), network=NOISY)
    training, _ = trained(task, runs=3)
    losses = training.validation_loss()
    for run in range(3):
        episode = replay(task, SEED + run)
        vector_to_parameters(training.networks.params[run], episode.network.parameters())
        for name, buffer in episode.network.named_buffers():
            buffer.copy_(training.networks.buffers[name][run])
        torch.testing.assert_close(losses[run], episode.validation_loss(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(training.validation_loss([run])[0], losses[run], rtol=1e-5, atol=1e-6)
        assert abs(episode.setup.loss_scale - 1) > 0.05


@pytest.mark.parametrize("stored", [False, True], ids=["generated", "stored"])
def test_new_episode_leaves_the_other_networks_alone(make_task, stored):
    """A reset that reached into a neighbour would change its weights in the middle of an episode."""
    task = replace(make_task(), network=NOISY)
    if stored:
        task = replace(task, data=Stored(torch.randn(100, 6), torch.randint(3, (100,)), points=(32, 64)))
    training, _ = trained(task, runs=3)
    kept = [tensor.clone() for tensor in everything(training)]
    training.begin([1], [np.random.default_rng(9)])
    step = first_step(training, [1])
    alone = begun(task, runs=1, seed=9)
    torch.testing.assert_close(step, first_step(alone, [0]), rtol=1e-5, atol=1e-6, equal_nan=True)
    for before, now, new in zip(kept, everything(training), everything(alone), strict=True):
        torch.testing.assert_close(now[[0, 2]], before[[0, 2]], rtol=0, atol=0)
        torch.testing.assert_close(now[[1]], new, rtol=1e-5, atol=1e-6)  # nothing is left of the episode before


def test_dropout_is_drawn_anew_for_every_network_and_step(make_task):
    """One mask for all would be another architecture, and no noise."""
    task = replace(
        make_task(decisions=(WINDOWS, WINDOWS), sgd_lr=(1e-12, 1e-12), optimizers={"SGD": 1}, gain=(1, 1)),
        network=lambda: nn.Sequential(of_ones(nn.Linear(6, 64)), nn.Dropout(0.5), of_ones(nn.Linear(64, 1))),
        data=(torch.ones(20, 6), torch.zeros(20, 1)),
        loss=nn.functional.mse_loss,
        batch_size=1,
    )
    training, moments = trained(task)
    losses = moments.loss / training.settings.loss_scale[:, None]  # with a batch of one, they tell how many were kept
    assert losses.std(0).min() > 0.1 and losses.std(1).min() > 0.1
    one, two, three = losses[:, 1:].chunk(WINDOWS, 1)
    assert not torch.allclose(one, two) and not torch.allclose(two, three)


@pytest.mark.parametrize("layer", [nn.Dropout, Dropout])
def test_noise_is_reproduced_and_the_callers_left_alone(make_task, layer):
    """Episodes with dropout must be replayable, and a user's own random numbers must not depend on them."""
    task, outcomes = replace(make_task(**RATES), network=partial(normed, partial(layer, 0.5))), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        training, moments = trained(task)
        outcomes.append([*moments, *everything(training)])
        assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    without, _ = trained(replace(task, network=normed))
    assert not torch.allclose(without.networks.params, training.networks.params, atol=1e-3)


def test_network_of_the_task_is_left_as_it_is(make_task):
    """A user who goes on with the module that the task hands out would find it trained, frozen or in another mode."""
    network = NOISY()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained(replace(make_task(**RATES), network=lambda: network), runs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(module.training for module in network.modules())


class Promising:
    """A source that promises four points, and then draws what it is told to."""

    max_points = 4

    def __init__(self, points=4, targets=4):
        self.points, self.targets = points, targets

    def draw(self, rng):
        x, y = torch.from_numpy(rng.standard_normal((9, 6), dtype=np.float32)), torch.zeros(9, dtype=torch.int64)
        return Points(x[: self.points], y[: self.targets], x[-2:], y[-2:])


def test_source_that_breaks_its_promise_is_refused(make_task):
    """Points beyond the promised number would land in the data of the next network."""
    begun(replace(make_task(), data=Promising()), runs=2)
    with pytest.raises(ValueError, match="max_points of the data is 4, but an episode has 5 points"):
        begun(replace(make_task(), batch_size=4, data=Promising(5, 5)), runs=2)
    with pytest.raises(ValueError, match="drew 4 inputs and 3 targets"):
        begun(replace(make_task(), batch_size=2, data=Promising(4, 3)), runs=2)


@pytest.mark.parametrize("network", [normed, NOISY], ids=["norm", "noise"])
def test_recorded_training_is_the_unrecorded_one(make_task, monkeypatch, network):
    """What a run comes to must not depend on how many steps were taken before its own."""
    task, outcomes = replace(make_task(optimizers=EVERY, **RATES), network=network, interval=10), []
    for calls in (10**9, 0):
        monkeypatch.setattr("rlsched.envs.recording.CALLS", calls)
        training, moments = trained(task)
        outcomes.append([*moments, *everything(training)])
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_compiled_training_is_the_eager_one(make_task, monkeypatch):
    """What is changed in place could be read after it was written, once a compiler has rearranged the step."""
    backend = "aot_eager"  # traces and rearranges as the default does; that one then takes a minute for machine code
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    task = replace(make_task(optimizers=EVERY, **RATES), network=normed)
    eager, moments = trained(task)
    compiled, other = trained(task, compile=True)
    for one, two in zip((*moments, *everything(eager)), (*other, *everything(compiled)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # of a step and of a validation


def test_device_is_given_by_name_or_as_such(make_task):
    """Both are what torch takes everywhere."""
    for device in ("cpu", torch.device("cpu")):
        assert InnerTraining(make_task(), 2, device=device).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99", None, 1.5])
def test_device_that_cannot_train_is_named(make_task, device):
    """An error from deep inside torch does not tell which option was wrong."""
    with pytest.raises(ValueError, match=rf"^device must be .*, got {device!r}: \w"):
        InnerTraining(make_task(), 2, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stored", [False, True], ids=["generated", "stored"])
def test_training_on_cuda_is_that_on_a_cpu(make_task, stored):
    """Something that stays behind on the CPU is an error; something that is another number there, another episode."""
    task = replace(make_task(optimizers=EVERY, **RATES), network=normed)
    if stored:
        task = replace(task, data=(torch.randn(100, 6), torch.randint(3, (100,))))
    here, moments = trained(task)
    there, other = trained(task, device="cuda")
    assert all(tensor.is_cuda for tensor in (*other, *everything(there)))
    for one, two in zip((*moments, *everything(here)), (*other, *everything(there)), strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-3, atol=1e-4, equal_nan=True)
    trained(replace(task, network=NOISY), device="cuda")
