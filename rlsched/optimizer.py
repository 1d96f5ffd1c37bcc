"""The two faces of a controller: an optimizer around the user's, and hooks on the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rlsched import handover
from rlsched.checkpoint import STATE_KEY
from rlsched.controller import ATTACHED, Controller, refuse_attached
from rlsched.once import evaluated_once, loss_of, no_global_hooks, step_hooks
from rlsched.options import shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rlsched.options import Options

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["Controller", "ScheduledOptimizer", "attach"]


def _of_controller(
    method: Callable[Concatenate[Controller, P], T],
) -> Callable[Concatenate[ScheduledOptimizer, P], T]:
    """What the controller does, as a method of the optimizer that it drives."""

    def call(self: ScheduledOptimizer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self.controller, *args, **kwargs)

    update_wrapper(call, method)
    return call


class ScheduledOptimizer(Optimizer):
    r"""A torch optimizer whose learning rate, momentum, clipping and weight decay follow a learned schedule.

    Around any `torch.optim.Optimizer` that has a learning rate, in place of a scheduler and of gradient clipping::

        optimizer = ScheduledOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), total_steps=10_000)
        for x, y in batches:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step(loss=loss)
            optimizer.zero_grad()

    **The schedule.** Each control has a state, which the policy π moves at the K ≈ `decisions` decisions of a run; at
    inner step n of N = `total_steps`, in the window after decision k, a group that came with (η, β, λ) has::

        learning rate   η_n = η · s(n/N) · exp(c_lr) · (1 − β_n) / (1 − β)      the last factor where momentum sums
        momentum        β_n = 1 − (1 − β) · 10^(−c_momentum)                    gradients (SGD, RMSprop), else 1
        clipping        g_n ← g_n · min(1, exp(c_clip + 2.3) · ḡ_{n−1} / ‖g_n‖, `max_grad_norm` / ‖g_n‖)
                        ḡ_n = 0.9 · ḡ_{n−1} + 0.1 · min(‖g_n‖, 10 · ḡ_{n−1})    with 100 for exp(…) while c_clip = 0
        weight decay    λ_n = λ · exp(c_weight_decay)                           decoupled or L2, as the optimizer has it

    and a decision moves them all by::

        c_k = c_{k−1} + δ ⊙ π(o_k) · min(1, d² / D(o_k)²)

    with every c within its bounds (`docs/spec.md`). All c are 0 at the start, and under a policy that stands still:
    then the groups follow the base schedule, which by default is linear decay, s(x) = 1 − x.

    | symbol | is |
    |---|---|
    | η, β, λ | the group's own `lr`, `momentum` or `betas[0]`, and `weight_decay` |
    | s | the policy's base schedule (`rlsched.base_schedule`) |
    | π | `policy`: the actions in [−1, 1] of a small network |
    | o_k | what it sees of the window before decision k: `docs/spec.md`, `rlsched.signals` |
    | D, d | Mahalanobis distance of o_k from what the policy was trained on, and how far it is trusted in full |
    | δ | the step of each control; larger in the first fifth of the run (`docs/spec.md`) |
    | g_n, ḡ_n | the gradient of all parameters, and the running average of its norm |

    **The first step** is a probe at e⁻⁷ of η. If it foretells that a step at η takes away more than 0.3 of the loss (to
    first order), or moves the weights by more than 0.1 of their norm, then c_lr starts as low as that asks for; and if
    the probe itself goes too far, it is undone and repeated at e⁻⁷ of that, and so on. What it found stands: c_lr goes
    above it only step by step, from windows in which the loss has fallen. Optimizers that find their own scale start
    without a probe, since their first step tells nothing.

    **Sources.** Schedules by reinforcement learning on statistics of the training itself: Daniel et al. 2016, "Learning
    Step Size Controllers for Robust Neural Network Training"; Xu et al. 2019, "Learning an Adaptive Learning Rate
    Schedule". Why the reward is the final loss: Wu et al. 2018, "Understanding Short-Horizon Bias in Stochastic
    Meta-Optimization". Linear decay: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by
    Refinement". Clipping relative to past norms: Seetharaman et al. 2020, "AutoClip". PPO: Schulman et al. 2017,
    "Proximal Policy Optimization Algorithms".

    The parameter groups and the state are those of the wrapped optimizer. `state_dict` carries the controller, and a
    run resumed from it is bit-equal to one that never stopped.

    Attributes:
        controller: the `Controller`, with what was done: `interventions`, a list of (step, message), and `proposal`,
            the hyperparameters that the policy last decided on, by control (`proposals`, of each group by itself).

    Args:
        optimizer: the optimizer to drive; its present learning rates and momenta are the base values.
        total_steps: optimizer steps in the whole run, at least 1: of some epochs, `rlsched.steps_of(loader, epochs)`.
            Training on after them keeps the last learning rate, and `extend` gives the run another length. None where
            nobody knows: the base schedule then stays at its highest factor until `finish(steps)` says when the run
            ends. The policy takes such a run for one in its first half, of a length that doubles as often as need be;
            the one that ships was not trained for it.
        policy: name of a shipped policy, path to a policy file, `http://host:port` of a server (`rlsched serve`), or
            any `rlsched.policy.Policy`.
        controls: what the policy may change, of `rlsched.control.CONTROLS`; by default all that it knows to move.
            With none of them the learning rate follows the base schedule exactly, and all else stays.
        decisions: about how many times in the run the policy decides.
        max_grad_norm: clip the gradient norm to this as well, as `clip_grad_norm_` would.
        follow_scheduler: take the learning rate that a torch scheduler sets (a warm-up, a schedule of your own) for
            η · s above: the policy modulates that. The parameter groups hold the scheduler's learning rate
            between the steps. Otherwise a scheduler has no effect, of which you are warned.
        on_divergence: what to do when the run diverges, that is, when its last three steps or more were not finite;
            when the running average of its loss is three times its lowest and half of what was gained is lost; when
            that much is lost for a tenth of the run, or less if it is worse than untrained; or when nothing at all is
            gained at more than twice the base schedule's learning rate. "rollback": weights and optimizer state are
            those of a snapshot again, and the learning rate is cut to a tenth. For the time being it does not come
            within half of what it was; good windows raise that bound. "cut": the same without a snapshot, which leaves
            weights as the divergence has left them. "raise": `DivergenceError`. None: nothing. A loss that is as high
            at the weights of the snapshot is a change of the data, and accepted.
        undo_overfitting: go back as well where the network learns its data by heart: where two validations in a row
            (`observe_validation`) are far above the lowest, by a factor of two at the start of a run, and by less and
            less, 2 % at its end. No snapshot is taken while the last one is 2 % above. With "rollback" alone.
        snapshots: what "rollback" keeps: "full", a copy of weights and optimizer state beside them; "host", the same in
            host memory; "weights", a copy of the weights alone, and the optimizer's state begins anew.
        model: whose buffers (those of batch norm, for example) are part of a snapshot. An optimizer does not know them:
            without `model` they stay as they are when weights go back.
        trust: the factor by which the policy may move the learning rate from the base schedule, either way: 2 for
            fine-tuning, say. None: as far as it likes, but for optimizers that find their own scale, for which it is 10
            (Rprop, Prodigy, D-Adaptation) or 100 (Adadelta). A probe, and a cut after a divergence, go lower if need
            be.
        lr_bounds: lowest and highest learning rate of any parameter group, whatever the schedule says. With weights in
            float16 the highest is never above 65,504, the largest number that they can be multiplied by.
        max_update_ratio: the learning rate is held so low that updates have at most so many times the norm of the
            weights (geometric mean of a window).
        shadow: look, propose and log, and do nothing: training is bit-equal to that without rlsched. The proposals
            are what the policy would make of the hyperparameters that are in use; see `Controller.proposal`.
        log_dir: folder for a TensorBoard event file with the figures of each decision, and a layout of their charts for
            its Custom Scalars (`docs/figures.md`, which has other loggers too).
        writer: a `SummaryWriter` to write the same to instead.
        patience: `should_stop` is True when so many validations in a row have brought no new best loss; None: never.
        keep_best: keep the weights of the best validation, for `best` and `restore_best`; as much memory as the
            weights, and as much more of a checkpoint.
        averaging: average the weights, for `averaged`; as much memory again, and a pass over the weights at each step.
        per_group: each parameter group has a state c of its own, which the policy moves by what is measured of that
            group: its gradients, updates and weights. The loss is the run's, and so is the answer to a divergence; the
            bound on updates, and how high the probe lets a group start, are the group's own. All groups are decided in
            one call. Gradients are clipped by one norm for all, as the strictest group has it. A group without
            gradients in a window stands still, and one that is added begins at the first group's c_lr. `freeze` is
            refused, as are sharded parameters. The shipped policy was not trained for it; docs/groups.md has figures.

    Behaviour worth knowing:
        - Gradients are clipped in place, and those of a step whose loss or gradient is not finite never reach the
          weights: they are set to None, or to zero on an accelerator, which would have to be waited for.
        - A loss that was divided by the number of mini-batches whose gradients are accumulated (`loss / n`, n backward
          passes) is recognised, if it is reported as the tensor that it is, and multiplied again. Report a number
          (`loss.item()`) undivided.
        - A gradient norm is clipped to 100 times its running average, whatever the controls: a guard against outliers.
        - Where the policy sees what it was not trained on, its actions shrink, and the learning rate just goes on
          along the base schedule.
        - All of that is logged: to the logger "rlsched", to TensorBoard, and to `controller.interventions`.
        - A step without any gradient is passed on, warned about once, and does not count.
        - An optimizer without momentum (SGD's default) keeps it that way, and a weight decay of 0 stays 0.
        - Where torch.distributed is initialized, all ranks of its default group train one model, and take the same
          steps and decisions: by the mean loss of those ranks that report one, and by the gradients of the whole
          model. With parameters that `fully_shard` (FSDP2) has sharded, all ranks have to call `state_dict`.

    Raises:
        ValueError: an argument is out of its range, the optimizer has no "lr" or a momentum of 1 or more, or
            parameters are those of FSDP1.
        DivergenceError: in `step`, with `on_divergence="raise"`.
        FileNotFoundError, PolicyFileError: the policy cannot be loaded.
    """

    @shows_options()
    def __init__(self, optimizer: Optimizer, **options: Unpack[Options]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, ScheduledOptimizer):
            raise ValueError("optimizer is a ScheduledOptimizer already")
        refuse_attached(optimizer)
        self.optimizer = optimizer
        self.controller = Controller(optimizer, **options)
        # Hook tables and the patched `step` of the base class, but not its parameter groups: those are delegated.
        super().__setstate__({"defaults": optimizer.defaults})

    # Optimizers rebind these in load_state_dict, so a copied reference would go stale.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        if handover.is_asked_by_helpers("_unflatten_optim_state_dict"):  # which reads what there is to load
            return [{**groups[0], STATE_KEY: None}, *groups[1:]]
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """One inner step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.
            loss: the loss that the gradients are of, a 0-d tensor or a float. `observe` can report it instead.

        Returns:
            The closure's loss, or `loss`.
        """
        if closure is not None:
            loss = loss_of(closure)
        elif isinstance(self.optimizer, LBFGS):
            raise ValueError("closure: LBFGS evaluates the loss several times in a step, and needs one")
        self.controller.prepare_step(loss)
        arguments = [] if closure is None else [evaluated_once(closure, loss, self.controller)]
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            with no_global_hooks():
                self.optimizer.step(*arguments)
        else:
            self.optimizer.step(*arguments)
        self.controller.finish_step()
        return loss

    observe = _of_controller(Controller.observe)
    observe_validation = _of_controller(Controller.observe_validation)
    averaged = _of_controller(Controller.averaged)
    best = _of_controller(Controller.best)
    restore_best = _of_controller(Controller.restore_best)
    extend = _of_controller(Controller.extend)
    finish = _of_controller(Controller.finish)
    freeze = _of_controller(Controller.freeze)

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` validations have brought no new best loss."""
        return self.controller.should_stop

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """For optimizers that train at other weights than those to evaluate with, as schedulefree's do."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def eval(self) -> None:
        """See `train`."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state_dict, and under "rlsched" the state of its schedule.

        A plain optimizer can load it as well: learning rate, momentum and weight decay are the user's own, and a
        momentum that sums gradients is within a factor of √2 of the one that belongs to them. For the helpers of
        torch.distributed.checkpoint, which drop what is under "rlsched", that is in the first parameter group, and
        momentum is as it is.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = handover.saved(self.controller)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that gave `state_dict` was.

        With that of a plain optimizer a schedule begins, from its learning rate and momentum, with a warning. A
        learning rate or weight decay that was changed in the groups of `state_dict` holds from then on.

        Raises:
            ValueError: as of `Controller.load_state_dict`. The optimizer and its schedule are then as they were.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        handover.load(self.controller, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def detach(self) -> Optimizer:
        """End the schedule, and return the wrapped optimizer, to go on without it; see `Controller.detach`."""
        self.controller.give_back()
        return self.optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "controller": self.controller, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"ScheduledOptimizer({self.optimizer!r},\n{self.controller!r})"


@shows_options()
def attach(optimizer: Optimizer, **options: Unpack[Options]) -> Controller:
    """Drive `optimizer` through step hooks: the object, its class and its state_dict stay the user's own.

    Args:
        optimizer: as for `ScheduledOptimizer`.
        options: the other arguments of `ScheduledOptimizer`.

    Returns:
        The controller. Its `observe(loss)` reports losses, unless they come with `optimizer.step(loss=loss)` or a
        closure; its `state_dict` has to be saved beside the optimizer's (`torch.distributed.checkpoint` takes the
        controller itself); `detach()` ends it. Hooks are lost when torch copies or pickles an optimizer. In the
        optimizer's `state_dict` learning rate, momentum and weight decay are the user's own.
    """
    if isinstance(optimizer, ScheduledOptimizer):
        raise ValueError("optimizer is a ScheduledOptimizer already")
    refuse_attached(optimizer)
    controller = Controller(optimizer, **options)
    before, after = step_hooks(controller)

    def with_own_values(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"] = controller.groups.given(state_dict["param_groups"])

    # Left to a fused optimizer, GradScaler would pass on scaled gradients, and steps that are to be skipped.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    setattr(optimizer, ATTACHED, True)
    controller._handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    if hasattr(optimizer, "_optimizer_state_dict_post_hooks"):  # which some do not have that wrap others
        controller._handles.append(optimizer.register_state_dict_post_hook(with_own_values))
    return controller
