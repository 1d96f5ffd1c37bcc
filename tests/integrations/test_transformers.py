"""ScheduleCallback in Transformers: real trainings, held against the same training in a plain loop."""

import copy
import functools
import warnings

import pytest
import torch
from helpers import SINGLE, assert_same_weights, lively_policy
from torch import nn

from rlsched import DivergenceError, ScheduledOptimizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import BertConfig, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers import BertForSequenceClassification as Sentences
from transformers import BertForTokenClassification as Words

from rlsched.control import CONTROL_NAMES
from rlsched.figures import FIGURES
from rlsched.integrations.transformers import ScheduleCallback
from rlsched.signals import OBSERVATION_NAMES

BATCHES, BATCH, EPOCHS, LENGTH, VOCABULARY = 10, 4, 2, 6, 12
STEPS = BATCHES * EPOCHS
OPTIONS = {"policy": lively_policy(), "decisions": 8}  # decides before the steps 1, 4, 7 ...


def model(kind=Sentences):
    """A transformer of 1,500 weights of the default precision, the same at every call."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=3, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return kind(config)


def data():
    """Sentences whose first word tells their class."""
    words = torch.randint(VOCABULARY, (BATCHES * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in words]


def token_data():
    """Sentences whose words have labels, but for the last ones of some: no two batches have as many labels."""
    rows = data()
    for i, row in enumerate(rows):
        row["labels"] = row["input_ids"] % 3
        row["labels"][1 + i % (LENGTH - 1) :] = -100
    return rows


def adamw(parameters, lr=0.01):
    """An optimizer like the one that the Trainer makes by itself."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def scheduled(parameters, steps=STEPS, lr=0.01, **options):
    """The wrapper that a user gives to the Trainer."""
    return ScheduledOptimizer(adamw(parameters, lr), total_steps=steps, **{**OPTIONS, **options})


def trainer(
    net, callback, optimizer=None, rows=None, trainer_class=Trainer, folder="unused", eval_dataset=None, **arguments
):
    """A Trainer that goes through the data in order, twice."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    defaults = {"learning_rate": 0.01, "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH}
    defaults |= {"max_grad_norm": 0.0, "use_cpu": True, "train_sampling_strategy": "sequential", **quiet}
    arguments = TrainingArguments(folder, **{**defaults, **arguments})
    callbacks = [callback] if callback else []
    rest = {"eval_dataset": eval_dataset, "optimizers": (optimizer, None), "callbacks": callbacks}
    return trainer_class(net, arguments, train_dataset=rows or data(), **rest)


def assert_same_in_single_precision(one, other):
    """The weights of two trainings in double precision differ by no more than what is measured in single precision."""
    torch.testing.assert_close(one, other, rtol=SINGLE, atol=SINGLE)


def grad_scaler(enabled=True):
    """Scales by so much that the first steps overflow, if losses are in the hundreds."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=5, enabled=enabled)


def loop(*args, **options):
    """The same training without the Trainer; returns the model, and the learning rate and the loss of each step."""
    return _loop(torch.get_default_dtype(), *args, **options)


@functools.cache
def _loop(
    dtype, kind=Sentences, accumulate=1, normalized=True, max_norm=None, bf16=False, factor=1.0, warm_up=0, **options
):
    net, lrs, losses = model(kind), [], []
    rows = data() if kind is Sentences else token_data()
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    scaler = grad_scaler(enabled=factor != 1.0)
    steps = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    optimizer = scheduled(net.parameters(), EPOCHS * len(steps), follow_scheduler=warm_up > 0, **options)
    optimizer.optimizer.register_step_post_hook(lambda inner, *_: lrs.append(inner.param_groups[0]["lr"]))
    scheduler = get_scheduler("linear", optimizer, warm_up, STEPS) if warm_up else None
    for micro_batches in EPOCHS * steps:
        items = sum(int((row["labels"] != -100).sum()) for batch in micro_batches for row in batch)
        loss = 0.0
        for batch in micro_batches:
            columns = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = net(**columns, num_items_in_batch=items if normalized else None)
            part = factor * (out.loss if normalized else out.loss / len(micro_batches))
            scaler.scale(part).backward()
            loss += part.detach()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        scaler.step(optimizer, loss=loss)
        scaler.update()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss))
    return net, lrs, losses


BOTH = pytest.mark.parametrize("wrapped", [False, True], ids=["callback alone", "wrapper"])


def run(wrapped, steps=STEPS, kind=Sentences, resume=None, lr=0.01, schedule=None, monitor="eval_loss", **options):
    """Train with a plain optimizer or the wrapper, and the callback that it needs; `schedule` has its options."""
    net, schedule = model(kind), schedule or {}
    optimizer = scheduled(net.parameters(), steps, lr, **schedule) if wrapped else adamw(net.parameters(), lr)
    callback = ScheduleCallback(monitor=monitor, **({} if wrapped else {**OPTIONS, **schedule}))
    it = trainer(net, callback, optimizer, **options)
    it.train(resume_from_checkpoint=resume)
    return net, callback, it


@BOTH
def test_training_is_that_of_a_plain_loop(wrapped):
    """The Trainer's users would get another schedule than the one that was evaluated."""
    net, callback, _ = run(wrapped)
    assert callback.controller.step_count == callback.controller.total_steps == STEPS
    assert_same_weights(net, loop()[0])


def test_the_trainers_own_optimizer_is_scheduled(double):
    """The one-line use would leave the optimizer that the Trainer makes as it is.

    It has two parameter groups, which adds up norms in another order than the loop does.
    """
    net, callback = model(), ScheduleCallback(**OPTIONS)
    it = trainer(net, callback, logging_strategy="steps", logging_steps=1)
    it.train()
    assert callback.controller.step_count == STEPS
    expected, lrs, _ = loop()
    assert learning_rates(it) == pytest.approx(lrs, rel=SINGLE)
    assert_same_in_single_precision(net.state_dict(), expected.state_dict())


@BOTH
@pytest.mark.parametrize("normalized", [False, True], ids=["mean of batches", "mean of items"])
def test_accumulated_batches_are_one_step_with_their_loss(wrapped, normalized):
    """The policy would see a loss that depends on how a batch is divided; the Trainer weights its parts in two ways.

    Of the ten batches the last two are left for a step of their own.
    """

    class Weighting(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = normalized

    options = {"kind": Words, "rows": token_data()}
    net, callback, _ = run(wrapped, 6, **options, gradient_accumulation_steps=4, trainer_class=Weighting)
    assert callback.controller.step_count == 6
    assert_same_weights(net, loop(Words, accumulate=4, normalized=normalized)[0])


@BOTH
def test_the_trainers_clipping_comes_first(wrapped):
    """The Trainer clips unless told otherwise; that would be lost, or hidden from the policy."""
    net, _, _ = run(wrapped, max_grad_norm=0.1)
    assert_same_weights(net, loop(max_norm=0.1)[0])


@BOTH
def test_bf16(wrapped):
    """Mixed precision would change what is reported."""
    net, _, _ = run(wrapped, bf16=True)
    assert_same_weights(net, loop(bf16=True)[0])


@BOTH
def test_grad_scaler(wrapped):
    """With fp16 the policy would see scaled losses, and count steps that GradScaler skipped."""

    class Fp16(Trainer):
        """With the scaler of fp16, which Accelerate has for accelerators only."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = grad_scaler()

        def _get_grad_norm(self, *args, **kwargs):
            """For the log only; would be that of scaled gradients here."""

        def compute_loss(self, *args, **kwargs):
            return 1000.0 * super().compute_loss(*args, **kwargs)

    net, callback, it = run(wrapped, trainer_class=Fp16)
    assert it.accelerator.scaler.get_scale() < 2.0**126
    assert callback.controller.step_count < STEPS
    assert_same_weights(net, loop(factor=1000.0)[0])


@BOTH
def test_evaluation_is_not_reported(wrapped):
    """Losses of other data, of batches that no gradient comes from, would pass for losses of the training."""
    names = tuple(name for name in OBSERVATION_NAMES if not name.startswith("validation"))
    options = {"policy": lively_policy(observations=names)}
    net, _, _ = run(wrapped, schedule=options, **EVALUATING)
    assert_same_weights(net, loop(**options)[0])


EVALUATING = {"eval_dataset": data()[:BATCH], "eval_strategy": "steps", "eval_steps": 3}


class Scripted(Trainer):
    """Evaluates to losses of a script, and keeps the weights that they are of."""

    LOSSES = (3.0, 1.0, 2.0, 1.5, 1.75, 0.5)

    def evaluate(self, *args, **kwargs):
        copies = self.__dict__.setdefault("copies", [])
        copies.append(copy.deepcopy(self.model))
        metrics = {"eval_loss": self.LOSSES[len(copies) - 1], "eval_b_loss": 0.1}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@BOTH
def test_evaluated_loss_is_reported_and_ends_the_training(wrapped):
    """Early stopping and the best weights would take a second callback, and the policy would see nothing of it."""
    options = {"patience": 2, "keep_best": True}
    net, callback, it = run(wrapped, schedule=options, trainer_class=Scripted, **EVALUATING)
    controller = callback.controller
    assert controller.validation == (1.5, 12, 1.0, 6, 2)
    assert controller.step_count == it.state.global_step == 12
    with controller.best(net):
        assert_same_weights(net, it.copies[1])
    before = controller.validation
    it.evaluate()
    assert controller.validation == before, "an evaluation after training is another matter"


def test_losses_of_several_data_sets_are_told_apart():
    """The loss that a user stops by would be that of whichever data set comes last."""
    sets = {"eval_dataset": {"a": data()[:BATCH], "b": data()[BATCH:]}, "eval_strategy": "steps", "eval_steps": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rlsched: monitor")
        _, callback, it = run(False, monitor="eval_b_loss", schedule={"patience": 99}, **sets)
    seen = [row["eval_b_loss"] for row in it.state.log_history if "eval_b_loss" in row]
    assert callback.controller.validation.loss == pytest.approx(seen[-1], abs=1e-4)
    assert callback.controller.validation.best == pytest.approx(min(seen), abs=1e-4)
    with pytest.warns(UserWarning, match="monitor='eval_loss' is not among the metrics .*'eval_a_loss'"):
        run(False, schedule={"patience": 99}, **sets)


@BOTH
def test_resumed_run_is_bit_equal(wrapped, tmp_path):
    """A resume with another learning rate is what users of schedule wrappers complain of most.

    Step 7 is in the middle of an epoch and between two decisions.
    """
    saving = {"save_strategy": "steps", "save_steps": 7, "logging_strategy": "steps", "logging_steps": 1}
    net, _, whole = run(wrapped, folder=tmp_path, **saving)
    resumed, _, half = run(wrapped, folder=tmp_path, resume=tmp_path / "checkpoint-7", **saving)
    assert learning_rates(half) == learning_rates(whole)
    assert_same_weights(resumed, net)


@BOTH
def test_training_that_goes_on_for_longer_is_extended(wrapped, tmp_path):
    """More epochs, the commonest reason to resume, would be refused, or trained at a learning rate of zero."""
    saving = {"save_strategy": "steps", "save_steps": 7}
    run(wrapped, folder=tmp_path, **saving)
    longer = {"num_train_epochs": 2 * EPOCHS, "resume": tmp_path / "checkpoint-14"}
    _, callback, _ = run(wrapped, 2 * STEPS, folder=tmp_path, **longer)
    controller = callback.controller
    assert controller.total_steps == controller.step_count == 2 * STEPS
    assert controller.length.base_schedule.factor(14, 2 * STEPS) == 1 - 14 / STEPS
    assert controller.state.window_end == 2 * STEPS


def learning_rates(it):
    """What a Trainer has logged."""
    return [logs["learning_rate"] for logs in it.state.log_history if "learning_rate" in logs]


@BOTH
def test_logs_show_the_effective_learning_rate(wrapped):
    """The log would show the Trainer's own schedule, which is not in use."""
    _, _, it = run(wrapped, logging_strategy="steps", logging_steps=1)
    _, lrs, losses = loop()
    assert learning_rates(it) == lrs
    assert [logs["loss"] for logs in it.state.log_history if "loss" in logs] == losses


FIGURES_HERE = set(FIGURES) - {"rlsched_policy/distance"}  # which a policy without a domain has not
DECISIONS = [1, 4, 7, 10, 13, 16, 19]


class Reporter(TrainerCallback):
    """Keeps what is logged, as that of Weights & Biases does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, model, **kwargs):
        self.logs.append((state.global_step, logs))


@BOTH
def test_figures_are_in_the_history_and_reported(wrapped, capsys):
    """Users of Weights & Biases and MLflow would see the loss, and nothing of why the schedule did what.

    Printed they would hide what the Trainer prints, and in its own log's place hide the loss.
    """
    net, schedule = model(), {} if wrapped else OPTIONS
    callback, optimizer = ScheduleCallback(**schedule), scheduled(net.parameters()) if wrapped else None
    it = trainer(net, callback, optimizer, logging_strategy="steps", logging_steps=1)
    it.add_callback(reporter := Reporter())
    it.train()
    history = [logs for logs in it.state.log_history if "rlsched/lr" in logs]
    assert [logs["step"] for logs in history] == DECISIONS
    assert all(logs.keys() >= FIGURES_HERE for logs in history)
    lrs = learning_rates(it)
    assert len(lrs) == STEPS
    assert [logs["rlsched/lr"] for logs in history] == [lrs[step] for step in DECISIONS]
    reported = [(step, logs) for step, logs in reporter.logs if "rlsched/lr" in logs]
    assert [{**logs, "step": step} for step, logs in reported] == history
    assert "rlsched" not in capsys.readouterr().out
    assert callback.controller.log.listeners == []


def test_tensorboard_gets_charts_and_messages_too(tmp_path, monkeypatch):
    """TensorBoard would open with all charts in the order of the alphabet, under names that no other log has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    _, callback, _ = run(False, report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert {tag for tag in events.Tags()["scalars"] if "rlsched" in tag} == FIGURES_HERE
    assert [event.step for event in events.Scalars("rlsched/lr")] == DECISIONS
    assert {"custom_scalars__config__", "rlsched/figures/text_summary"} <= set(events.Tags()["tensors"])
    assert callback.controller.log.writer is None


def test_total_steps_come_from_max_steps():
    """The learning rate would still be high when a run that is limited by steps ends."""
    _, callback, _ = run(False, max_steps=7)
    assert callback.controller.step_count == callback.controller.total_steps == 7


@BOTH
def test_warm_up_has_no_effect_and_says_so(wrapped):
    """A warm-up starts at 0, and would make that the base learning rate of the whole run."""
    with pytest.warns(UserWarning, match="which has no effect"):
        net, callback, _ = run(wrapped, warmup_steps=5)
    assert callback.controller.step_count == STEPS
    assert_same_weights(net, loop()[0])


EVERY_STEP = {"logging_strategy": "steps", "logging_steps": 1}


@BOTH
def test_warm_up_is_followed_on_demand(wrapped):
    """The warm-up that a user insists on would be lost, or the log show it without the policy's part."""
    net, _, it = run(wrapped, schedule={"follow_scheduler": True}, warmup_steps=5, **EVERY_STEP)
    expected, lrs, _ = loop(warm_up=5)
    assert learning_rates(it) == lrs
    assert_same_weights(net, expected)


@BOTH
def test_shadow_leaves_a_training_as_it_is(wrapped):
    """Nobody would add a callback that looks on to a run that matters, if it changed the run, or its logs."""
    options = {"warmup_steps": 5, "lr_scheduler_type": "cosine", "max_grad_norm": 0.1, **EVERY_STEP}
    net, callback, it = run(wrapped, schedule={"shadow": True}, **options)
    plain = model()
    alone = trainer(plain, None, adamw(plain.parameters()), **options)
    alone.train()
    assert_same_weights(net, plain)
    for name in ("learning_rate", "loss", "grad_norm"):
        seen, expected = ([logs[name] for logs in t.state.log_history if name in logs] for t in (it, alone))
        assert seen == expected
    assert callback.controller.step_count == STEPS
    assert list(callback.controller.proposal) == list(CONTROL_NAMES)


@pytest.mark.filterwarnings("ignore:rlsched. the run moved momentum")
@BOTH
def test_schedule_is_frozen_after_training(wrapped):
    """The schedule of a good run could not be kept, or would lack its end."""
    _, callback, it = run(wrapped, **EVERY_STEP)
    schedule = callback.controller.freeze()
    assert [0.01 * schedule(n) for n in range(STEPS)] == pytest.approx(learning_rates(it))


@BOTH
def test_steps_that_are_taken_back_are_those_of_a_plain_loop(wrapped):
    """Steps are taken back when a learning rate would explode, of which the Trainer knows nothing."""
    options = {"on_divergence": "rollback"}
    net, callback, it = run(wrapped, lr=1e6, schedule=options, **EVERY_STEP)
    expected, lrs, _ = loop(lr=1e6, **options)
    assert any("undone" in message for _, message in callback.controller.interventions)
    assert learning_rates(it) == lrs
    assert_same_weights(net, expected)


@BOTH
def test_divergence_ends_a_training(wrapped):
    """A lost run would burn its budget, or look like a bug."""

    class Diverges(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step > 5 else 1.0)

    with pytest.raises(DivergenceError, match="not finite"):
        run(wrapped, schedule={"on_divergence": "raise"}, trainer_class=Diverges)


def test_loss_that_the_model_does_not_return_is_missed():
    """With label smoothing the Trainer computes the loss by itself, and the schedule would lack it silently."""
    with pytest.warns(UserWarning) as caught:
        run(False, label_smoothing_factor=0.1)
    messages = [str(warning.message) for warning in caught]
    assert sum("the Trainer does not backpropagate the loss that the model returns" in m for m in messages) == 1


@BOTH
@pytest.mark.parametrize("factor", [1.0, 2.0], ids=["new loss", "the model's, weighted"])
def test_loss_of_ones_own_is_observed(wrapped, factor):
    """Many override compute_loss; the model's own loss, of labels that are given to it still, would be taken for it."""
    callback = ScheduleCallback() if wrapped else ScheduleCallback(**OPTIONS)

    class Own(Trainer):
        def compute_loss(self, net, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = net(**inputs)
            if factor == 1.0:
                loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
            else:
                loss = factor * outputs.loss / factor
            callback.observe(loss)
            return loss

    net = model()
    optimizer = scheduled(net.parameters()) if wrapped else adamw(net.parameters())
    it = trainer(net, callback, optimizer, trainer_class=Own)
    it.loss_is_scaled_for_ga = False
    it.train()
    assert_same_weights(net, loop()[0])


class Spy(TrainerCallback):
    """Keeps the losses that a wrapped optimizer is stepped with; comes after the callback under test."""

    def on_train_begin(self, *args, optimizer, **kwargs):
        self.losses = []
        optimizer.optimizer.register_step_pre_hook(lambda _, args, kwargs: self.losses.append(float(kwargs["loss"])))


def test_loss_is_weighted_as_it_is_backpropagated():
    """The policy compares the loss with gradients, which are of what a compute_loss makes of the model's loss."""

    class Half(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) / 2

    net = model()
    logging = {"logging_strategy": "steps", "logging_steps": 1}
    it = trainer(net, ScheduleCallback(), scheduled(net.parameters()), trainer_class=Half, **logging)
    it.add_callback(spy := Spy())
    it.train()
    assert spy.losses == [logs["loss"] for logs in it.state.log_history if "loss" in logs]


def test_optimizer_is_plain_again_after_training():
    """A schedule that is over would hold the learning rate of whatever the optimizer is used for next."""
    _, _, it = run(False)
    it.optimizer.param_groups[0]["lr"] = 0.5
    it.optimizer.step()
    assert it.optimizer.param_groups[0]["lr"] == 0.5
    assert "rlsched" not in it.optimizer.state_dict()["param_groups"][0]


def test_second_training_has_a_schedule_of_its_own():
    """It would start where the first one ended, at a learning rate of zero."""
    _, callback, it = run(False)
    first = callback.controller
    it.train()
    assert callback.controller is not first
    assert callback.controller.step_count == STEPS
    assert [base["lr"] for base in callback.controller.groups.bases] == [0.01]


def test_failed_training_leaves_no_trace():
    """After an exception in a notebook the next training would be scheduled twice."""

    class Fails(Trainer):
        fail = True

        def training_step(self, *args, **kwargs):
            if self.fail:
                raise ZeroDivisionError
            return super().training_step(*args, **kwargs)

    net = model()
    it = trainer(net, ScheduleCallback(**OPTIONS), adamw(net.parameters()), trainer_class=Fails)
    with pytest.raises(ZeroDivisionError):
        it.train()
    it.fail = False
    it.train()
    assert_same_weights(net, loop()[0])


def test_options_belong_to_the_wrapper():
    """The policy that is named to the callback would silently not be the one in use."""
    net = model()
    with pytest.raises(ValueError, match="it takes policy, not the callback"):
        trainer(net, ScheduleCallback(policy="default"), scheduled(net.parameters())).train()


@pytest.mark.filterwarnings("ignore:rlsched. a torch scheduler")  # true, and beside the point
def test_wrapper_of_another_length_is_warned_about():
    """A stale total_steps would cut the schedule short, or never let it end."""
    with pytest.warns(UserWarning, match="total_steps=60, but training is going to take 20 steps"):
        run(True, steps=60)


@pytest.mark.filterwarnings("ignore:rlsched. a torch scheduler")  # true, and beside the point
def test_checkpoint_without_a_schedule_is_warned_about(tmp_path):
    """A run that was begun without the callback would start its schedule anew in the middle, unsaid."""
    saving = {"folder": tmp_path, "save_strategy": "steps", "save_steps": 7}
    net = model()
    trainer(net, None, adamw(net.parameters()), **saving).train()
    with pytest.warns(UserWarning, match="the checkpoint holds no schedule"):
        run(False, **saving, resume=tmp_path / "checkpoint-7")


def test_buffers_go_back_with_the_weights():
    """Whoever has one line in a Trainer has no place to say which model has batch norm."""
    net, callback, _ = run(False, **EVERY_STEP)
    assert callback.controller.guard.model is net
