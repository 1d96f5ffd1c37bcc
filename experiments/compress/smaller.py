"""Smaller policies: pruned and taught, as trees, and with weights of 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor, nn

from rlsched.actors import Actor, Memory, Perceptron, actor
from rlsched.agents.explain.decisions import Decisions
from rlsched.policy import SchedulePolicy

UNITS = 16  # of a student
KEPT = 0.5  # part of the units of each layer that pruning leaves
LEAVES = 64  # of a tree
STEPS, BATCH, RATE = 3_000, 256, 3e-3  # of imitation, by Adam with linear decay


# --- By imitation ---------------------------------------------------------------------------------------------------


def student(policy: SchedulePolicy, decisions: Decisions, seed: int) -> Actor:
    """One layer of 16 units that decides what the policy does; it remembers nothing."""
    made = Perceptron(len(policy.observations), len(policy.controls), (UNITS,), policy.actor.activation)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter, generator=generator)
    return imitate(made, decisions, seed)


def imitate(made: Actor, decisions: Decisions, seed: int) -> Actor:
    """Teach an actor that remembers nothing, in place, what was decided. Beyond ±1 an action need only be so, too."""
    generator = torch.Generator().manual_seed(seed)
    made.requires_grad_(True)
    adam = torch.optim.Adam(made.parameters(), RATE)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randint(len(decisions.actions), (BATCH,), generator=generator)
        wanted, action = decisions.actions[rows], made(decisions.observations[rows])[0]
        reached = torch.where(wanted > 1, action.clamp(min=1), torch.where(wanted < -1, action.clamp(max=-1), wanted))
        adam.zero_grad()
        nn.functional.mse_loss(action, reached.detach()).backward()
        adam.step()
    return made.requires_grad_(False)


def pruned(policy: SchedulePolicy, decisions: Decisions, seed: int) -> Actor:
    """The half of the units of each layer that do most, and for the others their mean; then taught to do as before.

    A unit does what its output varies by, times the weights that take it. Whole units are taken, as weights that are
    zero would be stored, and multiplied, like others.

    Raises:
        ValueError: the actor is no perceptron: an LSTM of fewer units is none that a policy file holds.
    """
    old = policy.actor
    if not isinstance(old, Perceptron):
        raise ValueError(f"policy: a {old.name} actor cannot be pruned, only a {Perceptron.name}")
    layers = [(layer.weight.clone(), layer.bias.clone()) for layer in old.layers if isinstance(layer, nn.Linear)]
    between: Callable[[Tensor], Tensor] = getattr(torch, old.activation)
    outputs = decisions.observations
    for i in range(len(layers) - 1):
        weight, bias = layers[i]
        outputs = between(outputs @ weight.T + bias)
        behind, beyond = layers[i + 1]
        does = outputs.std(0) * behind.norm(dim=0)
        kept = does.argsort(descending=True)[: max(1, round(KEPT * len(does)))].sort().values
        gone = torch.ones(len(does), dtype=torch.bool).index_fill(0, kept, False)
        layers[i] = weight[kept], bias[kept]
        layers[i + 1] = behind[:, kept], beyond + behind[:, gone] @ outputs.mean(0)[gone]
        outputs = outputs[:, kept]
    made = actor(old.name, old.inputs, old.outputs, [len(bias) for _, bias in layers[:-1]], old.activation)
    made.load_state_dict(
        {f"layers.{i}.{what}": x for i, (w, b) in enumerate(layers) for what, x in (("weight", w), ("bias", b))}
    )
    return imitate(made, decisions, seed)


# --- As a tree ------------------------------------------------------------------------------------------------------


class Tree(Actor):
    """A decision tree for all actions, as tables: each decision goes down one level at a time, in all runs at once.

    It is for ONNX: no algorithm trains it, and so no policy file holds it.
    """

    name = "tree"

    def __init__(self, fitted: Any) -> None:
        super().__init__(fitted.n_features, fitted.value.shape[1], ())
        is_leaf = fitted.children_left < 0
        here = np.arange(fitted.node_count)
        self.depth = int(fitted.max_depth)
        tables = {
            "feature": np.where(is_leaf, 0, fitted.feature),
            "threshold": fitted.threshold.astype(np.float32),
            "left": np.where(is_leaf, here, fitted.children_left),  # at a leaf the way ends
            "right": np.where(is_leaf, here, fitted.children_right),
            "value": fitted.value[:, :, 0].astype(np.float32),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table))

    def forward(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        feature, threshold, left, right, value = (
            getattr(self, name) for name in ("feature", "threshold", "left", "right", "value")
        )
        node = torch.zeros_like(observation[..., 0], dtype=torch.int64)
        for _ in range(self.depth):
            seen = observation.gather(-1, feature[node].unsqueeze(-1)).squeeze(-1)
            node = torch.where(seen <= threshold[node], left[node], right[node])
        return value[node], None


def tree(policy: SchedulePolicy, decisions: Decisions, seed: int) -> Actor:
    """A tree of at most 64 leaves that decides what the policy does; it remembers nothing."""
    fitted = DecisionTreeRegressor(max_leaf_nodes=LEAVES, min_samples_leaf=5, random_state=seed)
    return Tree(fitted.fit(decisions.observations.numpy(), decisions.actions.clamp(-1, 1).numpy()).tree_)


# --- In eight bits --------------------------------------------------------------------------------------------------


def in_int8(model: Any) -> Any:
    """A copy of an ONNX model whose matrices are 8-bit integers, with a scale for each output of a layer.

    Weights alone: activations in 8 bits have one scale for all runs of a batch (`onnxruntime.quantization`), by which a
    run would be decided otherwise for who asks beside it. What measures the distance from the domain stays as it is.
    """
    from onnx import helper, numpy_helper

    model = copy.deepcopy(model)
    graph, nodes = model.graph, []
    matrices = [x for x in graph.initializer if x.name.startswith("actor.") and len(x.dims) == 2]
    for matrix in matrices:
        name, weight = matrix.name, numpy_helper.to_array(matrix)  # (outputs, inputs)
        scale = np.maximum(np.abs(weight).max(1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        whole = np.rint(weight / scale[:, None]).astype(np.int8)
        graph.initializer.remove(matrix)
        graph.initializer.extend(
            [numpy_helper.from_array(whole, f"{name}.int8"), numpy_helper.from_array(scale, f"{name}.scale")]
        )
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=0))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return model
