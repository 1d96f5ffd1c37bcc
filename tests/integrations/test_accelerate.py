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


def scheduled(parameters, steps=STEPS):
    """The optimizer that a user prepares."""
    return ScheduledOptimizer(adamw(parameters), total_steps=steps, **OPTIONS)


def train(accelerator, net, loader, optimizer, schedule, epochs=EPOCHS, max_norm=None):
    """The loop of Accelerate's tutorial, with one line more; returns the learning rate after every batch."""
    lrs = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                schedule.observe(loss)
                if accelerator.sync_gradients and max_norm is not None:
                    accelerator.clip_grad_norm_(net.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


def loop(accumulate=1, max_norm=None, bf16=False):
    """The same training without Accelerate; returns the network and the learning rate after every batch."""
    net, lrs = network(), []
    optimizer = scheduled(net.parameters(), STEPS // accumulate)
    for i, (x, y) in enumerate(batch for _ in range(EPOCHS) for batch in data()):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        (loss / accumulate).backward()
        optimizer.observe(loss)
        if (i + 1) % accumulate == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        lrs.append(optimizer.param_groups[0]["lr"])
    return net, lrs


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 5}, {"max_norm": 0.1}, {"bf16": True}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_training_is_that_of_a_plain_loop(options):
    """Micro-batches would be steps of their own, clipping would come too late, or precision change what is seen."""
    accumulate = options.get("accumulate", 1)
    precision = "bf16" if options.get("bf16") else "no"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    net = network()
    schedule = scheduled(net.parameters(), STEPS // accumulate)
    prepared, optimizer, loader = accelerator.prepare(net, schedule, data())
    lrs = train(accelerator, prepared, loader, optimizer, schedule, max_norm=options.get("max_norm"))
    expected, expected_lrs = loop(**options)
    assert schedule.controller.step_count == STEPS // accumulate
    assert lrs == expected_lrs
    assert_same_weights(net, expected)


def prepared(accelerator, attached):
    """A network and all that trains it, the schedule being the wrapper or attached."""
    net = network()
    optimizer = adamw(net.parameters()) if attached else scheduled(net.parameters())
    schedule = attach(optimizer, total_steps=STEPS, **OPTIONS) if attached else optimizer
    net, optimizer, loader = accelerator.prepare(net, optimizer, data())
    if attached:
        accelerator.register_for_checkpointing(schedule)
    return net, loader, optimizer, schedule


@pytest.mark.parametrize("attached", [False, True], ids=["wrapper", "attached"])
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
