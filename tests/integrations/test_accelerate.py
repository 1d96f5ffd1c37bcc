"""A ScheduledOptimizer that Accelerate has prepared: real trainings, held against the same training in a plain loop."""

import pytest
import torch
from helpers import assert_same_weights, lively_policy, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rlsched import ScheduledOptimizer, attach

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

BATCHES, EPOCHS = 10, 3
STEPS = BATCHES * EPOCHS
OPTIONS = {"policy": lively_policy(), "decisions": 8}  # decides before the steps 1, 5, 9 ...


def forget():
    """Accelerate keeps the choices of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh():
    """Each test makes an Accelerator of its own."""
    forget()


def data():
    """Batches of 16, in the same order in every epoch."""
    inputs = torch.randn(16 * BATCHES, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(-1)), batch_size=16)


def adamw(parameters):
    """The optimizer of all trainings here."""
    return torch.optim.AdamW(parameters, lr=0.01)


def scheduled(parameters, steps=STEPS, **options):
    """The optimizer that a user prepares."""
    return ScheduledOptimizer(adamw(parameters), total_steps=steps, **OPTIONS, **options)


def warm_up(optimizer):
    """A scheduler that begins at zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))


def grad_scaler(enabled=True):
    """Scales by so much that the first steps overflow, if losses are in the hundreds."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=5, enabled=enabled)


def train(accelerator, net, loader, optimizer, schedule, epochs=EPOCHS, max_norm=None, factor=1.0, scheduler=None):
    """The loop of Accelerate's tutorial, with one line more; returns the learning rate after every batch."""
    lrs = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = factor * nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                schedule.observe(loss)
                if accelerator.sync_gradients and max_norm is not None:
                    accelerator.clip_grad_norm_(net.parameters(), max_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
            lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


def loop(accumulate=1, max_norm=None, bf16=False, factor=1.0, schedule=None, **options):
    """The same training without Accelerate; returns the network and the learning rate after every batch."""
    net, lrs = network(), []
    optimizer = scheduled(net.parameters(), STEPS // accumulate, **options)
    scheduler = None if schedule is None else schedule(optimizer)
    scaler = grad_scaler(enabled=factor != 1.0)
    for i, (x, y) in enumerate(batch for _ in range(EPOCHS) for batch in data()):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x)
        loss = factor * nn.functional.cross_entropy(out.float(), y)
        scaler.scale(loss / accumulate).backward()
        optimizer.observe(loss)
        if (i + 1) % accumulate == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        lrs.append(optimizer.param_groups[0]["lr"])
    return net, lrs


def prepared(accelerator, attached, steps=STEPS, **options):
    """A network and all that trains it, the schedule being the wrapper or attached."""
    net = network()
    optimizer = adamw(net.parameters()) if attached else scheduled(net.parameters(), steps, **options)
    schedule = attach(optimizer, total_steps=steps, **OPTIONS, **options) if attached else optimizer
    net, optimizer, loader = accelerator.prepare(net, optimizer, data())
    if attached:
        accelerator.register_for_checkpointing(schedule)
    return net, loader, optimizer, schedule


BOTH = pytest.mark.parametrize("attached", [False, True], ids=["wrapper", "attached"])


@BOTH
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 5}, {"max_norm": 0.1}, {"bf16": True}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_training_is_that_of_a_plain_loop(attached, options):
    """Micro-batches would be steps of their own, clipping would come too late, or precision change what is seen."""
    accumulate = options.get("accumulate", 1)
    precision = "bf16" if options.get("bf16") else "no"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    net, loader, optimizer, schedule = prepared(accelerator, attached, STEPS // accumulate)
    lrs = train(accelerator, net, loader, optimizer, schedule, max_norm=options.get("max_norm"))
    expected, expected_lrs = loop(**options)
    assert lrs == expected_lrs
    assert_same_weights(net, expected)


@BOTH
def test_grad_scaler(attached):
    """With fp16 the policy would see scaled losses, and count steps that GradScaler skipped."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = grad_scaler()  # that of fp16, which Accelerate has for accelerators only
    net, *rest = prepared(accelerator, attached)
    lrs = train(accelerator, net, *rest, factor=1000.0)
    expected, expected_lrs = loop(factor=1000.0)
    assert accelerator.scaler.get_scale() < 2.0**126
    assert lrs == expected_lrs
    assert len(set(lrs)) < STEPS, "no step was skipped"
    assert_same_weights(net, expected)


@BOTH
@pytest.mark.parametrize("accumulate", [1, 5])
@pytest.mark.parametrize("follow", [False, True])
def test_scheduler_that_is_prepared_beside(attached, accumulate, follow):
    """A warm-up begins at 0: followed or not, it must not be the base learning rate; and Accelerate steps it by rules
    of its own.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net, loader, optimizer, schedule = prepared(accelerator, attached, STEPS // accumulate, follow_scheduler=follow)
    options = {"scheduler": accelerator.prepare(warm_up(optimizer.optimizer))}
    if follow:
        lrs = train(accelerator, net, loader, optimizer, schedule, **options)
        expected, expected_lrs = loop(accumulate, schedule=warm_up, follow_scheduler=True)
        assert lrs == expected_lrs
    else:
        with pytest.warns(UserWarning, match="scheduler.*has no effect"):
            train(accelerator, net, loader, optimizer, schedule, **options)
        expected, _ = loop(accumulate)
    assert_same_weights(net, expected)


@BOTH
def test_resumed_run_is_bit_equal(attached, tmp_path):
    """A resume with another learning rate is what users of schedule wrappers complain of most."""
    first, second = Accelerator(cpu=True), Accelerator(cpu=True)
    one, two = prepared(first, attached), prepared(second, attached)
    train(first, *one, epochs=1)
    first.save_state(tmp_path)
    lrs = train(first, *one, epochs=2)
    second.load_state(tmp_path)
    assert train(second, *two, epochs=2) == lrs
    assert_same_weights(two[0], one[0])
