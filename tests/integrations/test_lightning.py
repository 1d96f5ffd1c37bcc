"""ScheduleCallback in Lightning: real trainings, held against the same training in a plain loop."""

import copy
import csv
import math
import warnings

import pytest
import torch
from helpers import assert_same_weights, lively_policy, network
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from rlsched import DivergenceError, ScheduledOptimizer

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from rlsched.control import CONTROL_NAMES  # noqa: E402
from rlsched.figures import FIGURES  # noqa: E402
from rlsched.integrations.lightning import ScheduleCallback  # noqa: E402

BATCHES, EPOCHS = 10, 3
STEPS = BATCHES * EPOCHS
OPTIONS = {"policy": lively_policy(), "decisions": 8}  # decides before the steps 1, 5, 9 ...

pytestmark = [
    # Advice for trainings of another size than these.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Lightning's own.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def data():
    """Batches of 16, in the same order in every epoch."""
    inputs = torch.randn(16 * BATCHES, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(-1)), batch_size=16)


def adamw(parameters, lr=0.01):
    """The optimizer of all modules here."""
    return torch.optim.AdamW(parameters, lr=lr)


def scheduled(parameters, steps=STEPS, lr=0.01, **options):
    """The optimizer of a plain loop, and of modules that return the wrapper."""
    return ScheduledOptimizer(adamw(parameters, lr), total_steps=steps, **OPTIONS, **options)


def warm_up(optimizer):
    """A scheduler that begins at zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))


class Module(pl.LightningModule):
    """A user's module, which knows nothing of the callback."""

    def __init__(self, make=adamw):
        super().__init__()
        self.net = network()
        self.make = make
        self.lrs = []

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.make(self.net.parameters())

    def on_train_batch_end(self, *args):
        self.lrs.append(self.optimizers().param_groups[0]["lr"])


def fit(module, *callbacks, loader=None, val=None, ckpt_path=None, logger=False, **options):
    """Fit the module quietly, for three epochs."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "logger": logger, **quiet, **options}
    trainer = pl.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, loader or data(), val, ckpt_path=ckpt_path)
    return trainer


def loop(accumulate=1, max_norm=None, dtype=None, scaler=None, schedule=None, **options):
    """The same training without Lightning; returns the network and the learning rate after every batch."""
    net, lrs = network(), []
    optimizer = scheduled(net.parameters(), STEPS // accumulate, **options)
    scheduler = None if schedule is None else schedule(optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(EPOCHS):
        losses = []
        for i, (x, y) in enumerate(data()):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
                losses.append(nn.functional.cross_entropy(net(x), y))
            scaler.scale(losses[-1] / accumulate).backward()
            if (i + 1) % accumulate == 0:
                scaler.unscale_(optimizer)
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), max_norm)
                scaler.step(optimizer, loss=torch.stack(losses).detach().mean())
                scaler.update()
                optimizer.zero_grad()
                losses = []
                if scheduler is not None:
                    scheduler.step()
            lrs.append(optimizer.param_groups[0]["lr"])
    return net, lrs


BOTH = pytest.mark.parametrize("wrapped", [False, True], ids=["callback alone", "wrapper"])


def both(wrapped, kind=Module, lr=0.01, **options):
    """A module that returns a plain optimizer, or one that returns the wrapper, and the callback that it needs."""
    if wrapped:
        return kind(lambda p: scheduled(p, lr=lr, **options)), ScheduleCallback()
    return kind(lambda p: adamw(p, lr)), ScheduleCallback(**OPTIONS, **options)


@BOTH
def test_training_is_that_of_a_plain_loop(wrapped):
    """Lightning's users would get another schedule than the one that was evaluated."""
    module, callback = both(wrapped)
    fit(module, callback)
    net, lrs = loop()
    assert module.lrs == lrs
    assert_same_weights(module.net, net)
    assert callback.controller.step_count == STEPS


def test_wrapper_without_the_callback_takes_the_closures_loss():
    """Without accumulation and fp16 nothing but the wrapper is needed."""
    module = Module(scheduled)
    fit(module)
    assert_same_weights(module.net, loop()[0])


def test_accumulated_batches_are_one_step_with_their_mean_loss():
    """The policy would see a fifth of the loss of the last batch, and its time run five times too fast."""
    for make, options in ((adamw, OPTIONS), (lambda p: scheduled(p, STEPS // 5), {})):
        module, callback = Module(make), ScheduleCallback(**options)
        fit(module, callback, accumulate_grad_batches=5)
        net, lrs = loop(accumulate=5)
        assert callback.controller.step_count == STEPS // 5
        assert module.lrs == lrs
        assert_same_weights(module.net, net)


@BOTH
def test_lightnings_clipping_comes_first(wrapped):
    """A user's gradient_clip_val would be lost, or be applied to gradients that the policy has not seen."""
    module, callback = both(wrapped)
    fit(module, callback, gradient_clip_val=0.1)
    assert_same_weights(module.net, loop(max_norm=0.1)[0])


@BOTH
def test_bf16_mixed(wrapped):
    """Mixed precision would change what is reported."""
    module, callback = both(wrapped)
    fit(module, callback, precision="bf16-mixed")
    assert_same_weights(module.net, loop(dtype=torch.bfloat16)[0])


@BOTH
def test_16_mixed_reports_unscaled_losses_and_counts_no_skipped_step(wrapped):
    """With fp16 Lightning runs the closure before the step, on a scaled loss, and GradScaler skips steps."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=10)

    module, callback = both(wrapped)
    mine = scaler()
    fit(module, callback, plugins=[MixedPrecision("16-mixed", "cpu", mine)])
    net, _ = loop(dtype=torch.float16, scaler=scaler())
    assert mine.get_scale() < 2.0**126
    assert callback.controller.step_count < STEPS
    assert_same_weights(module.net, net)


@BOTH
def test_resumed_run_is_bit_equal(wrapped, tmp_path):
    """A resume with another learning rate is what users of schedule wrappers complain of most.

    Step 7 is in the middle of an epoch, where Lightning starts the epoch's data anew, and between two decisions.
    """
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    loader = DataLoader(ConcatDataset(BATCHES * [Subset(data().dataset, range(16))]), batch_size=16)
    module, callback = both(wrapped)
    fit(module, callback, keep, enable_checkpointing=True, loader=loader)
    resumed, callback = both(wrapped)
    fit(resumed, callback, keep, enable_checkpointing=True, loader=loader, ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.lrs == module.lrs[7:]
    assert_same_weights(resumed.net, module.net)


class Logger(DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append(metrics)


@BOTH
def test_learning_rate_monitor_shows_the_effective_learning_rate(wrapped):
    """The plot that a user looks at first would show the base learning rate."""
    logger = Logger()
    module, callback = both(wrapped)
    fit(module, callback, LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    seen = [metrics["lr-AdamW"] for metrics in logger.seen if "lr-AdamW" in metrics]
    assert seen == pytest.approx([0.01, *module.lrs[:-1]])  # it looks before the step


FIGURES_HERE = set(FIGURES) - {"rlsched_policy/distance"}  # which a policy without a domain has not
DECISIONS = [1, 5, 9, 13, 17, 21, 25, 29]


@BOTH
def test_every_logger_gets_the_figures_of_every_decision(wrapped, tmp_path):
    """Users of Weights & Biases, MLflow and CSV files would see the loss, and nothing of why the schedule did what."""
    module, callback = both(wrapped)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=99)
    fit(module, callback, logger=logger, log_every_n_steps=7)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rlsched/lr"]]
    assert [int(row["step"]) for row in rows] == DECISIONS
    assert {name for name in rows[-1] if name.startswith("rlsched")} == FIGURES_HERE
    assert [float(row["rlsched/lr"]) for row in rows] == [module.lrs[step] for step in DECISIONS]
    assert callback.controller.log.listeners == []


@BOTH
def test_tensorboard_logger_gets_charts_and_messages_too(wrapped, tmp_path):
    """TensorBoard would open with all charts in the order of the alphabet, or have them twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    module, callback = both(wrapped)
    logger = TensorBoardLogger(tmp_path)
    fit(module, callback, logger=logger)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES_HERE
    assert [event.step for event in events.Scalars("rlsched/lr")] == DECISIONS
    assert {"custom_scalars__config__", "rlsched/figures/text_summary"} <= set(events.Tags()["tensors"])
    assert callback.controller.log.writer is None, "a second fit would write into the log of the first"


def test_optimizer_is_plain_again_after_fit():
    """A schedule that is over would hold the learning rate of whatever the optimizer is used for next."""
    made = []
    module = Module(lambda p: made.append(adamw(p)) or made[-1])
    fit(module, ScheduleCallback(**OPTIONS))
    (optimizer,) = made
    optimizer.param_groups[0]["lr"] = 0.5
    module.training_step(next(iter(data()))).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_callback_serves_a_second_fit():
    """The schedule of a second fit would start where the first one ended, at a learning rate of zero."""
    callback = ScheduleCallback(**OPTIONS)
    fit(Module(), callback)
    module = Module()
    fit(module, callback)
    assert_same_weights(module.net, loop()[0])


def test_failed_fit_leaves_no_trace(monkeypatch):
    """After an exception in a notebook the next fit would be scheduled twice."""
    optimizer = adamw(network().parameters())
    callback = ScheduleCallback(**OPTIONS)
    module = Module()
    optimizer = adamw(module.net.parameters())
    module.make = lambda _: optimizer
    monkeypatch.setattr(module, "training_step", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    monkeypatch.undo()
    fit(module, callback)
    assert_same_weights(module.net, loop()[0])


class Manual(Module):
    """Steps by hand."""

    def __init__(self, make):
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch)
        self.manual_backward(loss)
        optimizer.observe(loss)
        optimizer.step()


def test_manual_optimization_needs_no_callback():
    """The remedy that the error message names would not work."""
    module = Manual(scheduled)
    fit(module)
    assert_same_weights(module.net, loop()[0])


def test_manual_optimization_is_refused():
    """No loss would be reported, or that of another optimizer's step."""
    with pytest.raises(ValueError, match="manual optimization: return a ScheduledOptimizer, and call its observe"):
        fit(Manual(adamw), ScheduleCallback())


def test_options_belong_to_the_wrapper():
    """The policy that is named to the callback would silently not be the one in use."""
    with pytest.raises(ValueError, match="it takes policy, not the callback"):
        fit(Module(scheduled), ScheduleCallback(policy="default"))


def test_training_of_unknown_length_is_refused():
    """A schedule over an infinite number of steps never decays."""
    with pytest.raises(ValueError, match="give it max_steps, or ScheduleCallback total_steps"):
        fit(Module(), ScheduleCallback(), max_epochs=-1)


def test_total_steps_come_from_max_steps():
    """The learning rate would still be high when a run that is limited by steps ends."""
    callback = ScheduleCallback(**OPTIONS)
    fit(Module(), callback, max_epochs=-1, max_steps=7)
    assert callback.controller.total_steps == 7
    assert callback.controller.step_count == 7


def test_wrapper_of_another_length_is_warned_about():
    """A stale total_steps would cut the schedule short, or never let it end."""
    with pytest.warns(UserWarning, match=r"total_steps=60, but training is going to take 30 steps"):
        fit(Module(lambda p: scheduled(p, 60)), ScheduleCallback())


def test_checkpoint_without_a_schedule_is_warned_about(tmp_path):
    """A run that was begun without the callback would start its schedule anew in the middle, unsaid."""
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    fit(Module(), keep, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="the checkpoint holds no schedule"):
        fit(
            Module(),
            keep,
            ScheduleCallback(**OPTIONS),
            enable_checkpointing=True,
            ckpt_path=tmp_path / f"step={BATCHES}.ckpt",
        )


class Scheduled(Module):
    """Has a scheduler of its own."""

    schedule = staticmethod(warm_up)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


@BOTH
def test_lr_scheduler_has_no_effect_and_says_so(wrapped):
    """A warm-up starts at 0, and would make that the base learning rate of the whole run."""
    module, callback = both(wrapped, Scheduled)
    with pytest.warns(UserWarning, match="a torch scheduler, or other code, has changed the learning rate"):
        fit(module, callback)
    assert callback.controller.step_count == STEPS
    assert_same_weights(module.net, loop()[0])


@BOTH
def test_lr_scheduler_is_followed_on_demand(wrapped):
    """The warm-up that a user insists on would be lost."""
    module, callback = both(wrapped, Scheduled, follow_scheduler=True)
    fit(module, callback)
    net, lrs = loop(schedule=warm_up, follow_scheduler=True)
    assert module.lrs == lrs
    assert_same_weights(module.net, net)


@BOTH
def test_shadow_leaves_a_fit_as_it_is(wrapped):
    """Nobody would add a callback that looks on to a run that matters, if it changed the run."""

    class Cosine(Scheduled):
        schedule = staticmethod(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS))

    module, callback = both(wrapped, Cosine, shadow=True)
    alone, loggers = Cosine(), [Logger(), Logger()]
    for logger, callbacks in zip(loggers, [(module, callback), (alone,)], strict=True):
        options = {"logger": logger, "log_every_n_steps": 1, "gradient_clip_val": 0.1}
        fit(*callbacks, LearningRateMonitor("step"), **options)
    assert_same_weights(module.net, alone.net)
    assert module.lrs == alone.lrs
    seen, expected = ([metrics["lr-AdamW"] for metrics in logger.seen if "lr-AdamW" in metrics] for logger in loggers)
    assert seen == expected
    assert callback.controller.step_count == STEPS
    assert list(callback.controller.proposal) == list(CONTROL_NAMES)


@pytest.mark.filterwarnings("ignore:rlsched. the run moved momentum")
@BOTH
def test_schedule_is_frozen_after_fit(wrapped):
    """The schedule of a good run could not be kept, or would lack its end."""
    module, callback = both(wrapped)
    fit(module, callback)
    schedule = callback.controller.freeze()
    assert [0.01 * schedule(n) for n in range(STEPS)] == pytest.approx(module.lrs)


class Counting(Module):
    """Counts its training steps."""

    steps = 0

    def training_step(self, batch):
        self.steps += 1
        return super().training_step(batch)


@BOTH
def test_steps_that_are_taken_back_are_those_of_a_plain_loop(wrapped):
    """Lightning hands its closure to the optimizer: at the snapshot it would be evaluated, and stepped from, again."""
    options = {"lr": 1e6, "on_divergence": "rollback"}
    module, callback = both(wrapped, Counting, **options)
    fit(module, callback)
    net, lrs = loop(**options)
    assert any("undone" in message for _, message in callback.controller.interventions)
    assert module.steps == STEPS
    assert module.lrs == lrs
    assert_same_weights(module.net, net)


def test_divergence_ends_a_fit_and_leaves_no_trace():
    """A lost run would look like a bug, and the schedule go on with an optimizer that is used again."""

    class Diverges(Module):
        def training_step(self, batch):
            return super().training_step(batch) * (math.nan if self.global_step > 5 else 1.0)

    made = []
    module = Diverges(lambda p: made.append(adamw(p)) or made[-1])
    with pytest.raises(DivergenceError, match="not finite"):
        fit(module, ScheduleCallback(**OPTIONS, on_divergence="raise"))
    (optimizer,) = made
    optimizer.param_groups[0]["lr"] = 0.5
    Module.training_step(module, next(iter(data()))).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_skipped_batches_are_no_steps():
    """A training_step that returns None has no loss and no gradient."""

    class Skips(Module):
        def training_step(self, batch):
            return super().training_step(batch) if self.global_step % 3 else None

    callback = ScheduleCallback(**OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Skips(), callback)
    assert any("no parameter has a gradient" in str(w.message) for w in caught)
    assert callback.controller.step_count == STEPS - math.ceil(STEPS / 3)


class Validates(Module):
    """Logs a validation loss, and keeps the weights that it is of; in the sanity check it is the lowest of all."""

    LOSSES = (3.0, 1.0, 2.0, 1.5, 1.75, 0.5)  # after each epoch

    def __init__(self, make=adamw, name="val_loss"):
        super().__init__(make)
        self.name, self.copies = name, []

    def validation_step(self, batch):
        self.log(self.name, 0.0 if self.trainer.sanity_checking else self.LOSSES[self.current_epoch])

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.copies.append(copy.deepcopy(self.net))


VALIDATING = {"val": data(), "max_epochs": 6, "num_sanity_val_steps": 1}


@BOTH
@pytest.mark.parametrize("name", ["val_loss", "loss/validation"])
def test_validation_loss_is_reported_and_ends_the_fit(wrapped, name):
    """Early stopping and the best weights would take a second callback, and the policy would see nothing of it."""
    options = {"patience": 2, "keep_best": True}
    make = (lambda p: scheduled(p, 6 * BATCHES, **options)) if wrapped else adamw
    module = Validates(make, name)
    callback = ScheduleCallback(monitor=name, **({} if wrapped else {**OPTIONS, **options}))
    fit(module, callback, **VALIDATING)
    controller = callback.controller
    assert controller.validation == (1.5, 4 * BATCHES, 1.0, 2 * BATCHES, 2)
    assert controller.step_count == 4 * BATCHES
    with controller.best(module):
        assert_same_weights(module.net, module.copies[1])


def test_validation_outside_of_training_is_not_reported():
    """A test set that is looked at afterwards would be the best validation of the run."""
    module, callback = Validates(), ScheduleCallback(**OPTIONS)
    trainer = fit(module, callback, val=data(), num_sanity_val_steps=0)
    before = callback.controller.validation
    module.LOSSES = [0.1] * 9
    trainer.validate(module, data(), verbose=False)
    assert callback.controller.validation == before == (2.0, STEPS, 1.0, 2 * BATCHES, 1)


@pytest.mark.parametrize("options", [{"patience": 2}, {"keep_best": True}, {"monitor": "val_los"}], ids=str)
def test_validation_loss_that_is_missed_is_said_once(options):
    """A metric with a name of its own would end in a run that never stops, and has no best weights."""
    with pytest.warns(UserWarning, match=r"monitor='val_los.*is not among the metrics \['accuracy'\]") as caught:
        fit(Validates(name="accuracy"), ScheduleCallback(**OPTIONS, **options), **VALIDATING)
    assert sum("monitor=" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rlsched")
        fit(Validates(name="accuracy"), ScheduleCallback(**OPTIONS), **VALIDATING)


@BOTH
def test_fit_that_goes_on_for_longer_is_extended(wrapped, tmp_path):
    """More epochs, the commonest reason to resume, would be refused, or trained at a learning rate of zero."""
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    module, callback = both(wrapped)
    fit(module, callback, keep, enable_checkpointing=True)
    assert callback.controller.total_steps == STEPS
    module = Module(lambda p: scheduled(p, 2 * STEPS)) if wrapped else Module()
    callback = ScheduleCallback(**({} if wrapped else OPTIONS))
    ckpt_path = tmp_path / f"step={2 * BATCHES}.ckpt"
    fit(module, callback, keep, enable_checkpointing=True, max_epochs=2 * EPOCHS, ckpt_path=ckpt_path)
    controller = callback.controller
    assert controller.total_steps == controller.step_count == 2 * STEPS
    assert controller.length.base_schedule.factor(2 * BATCHES, 2 * STEPS) == 1 - 2 * BATCHES / STEPS
    assert controller.state.window_end == 2 * STEPS


def test_buffers_go_back_with_the_weights():
    """Whoever has one line in a Trainer has no place to say which model has batch norm."""
    module, callback = both(False)
    fit(module, callback)
    assert callback.controller.guard.model is module
