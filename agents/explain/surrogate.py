"""Models that a reader can follow, of what a policy decides, and how faithful they are to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_selection import RFE
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from rlsched.agents.explain.decisions import Decisions
from rlsched.control import EARLY

FOLDS = 4  # of the runs: each is predicted by a surrogate of the others
Array = NDArray[np.float64]


class Surrogate(ABC):
    """A small model of one action."""

    name: ClassVar[str]

    @abstractmethod
    def fit(self, observations: Array, progress: Array, actions: Array) -> Surrogate:
        """Learn from observations (n, observations), the progress of the run and the action, each (n,)."""

    @abstractmethod
    def predict(self, observations: Array, progress: Array) -> Array:
        """The actions, (n,)."""

    @abstractmethod
    def rules(self, observations: Sequence[str]) -> list[str]:
        """The model in words, a line each, with these names of the observations."""


class Tree(Surrogate):
    """A regression tree: the space of observations in a few boxes, with one action in each of them."""

    name = "tree"
    LEAVES = 8
    SMALLEST = 0.02  # part of the decisions that a leaf holds at least

    def fit(self, observations: Array, progress: Array, actions: Array) -> Surrogate:
        tree = DecisionTreeRegressor(max_leaf_nodes=self.LEAVES, min_samples_leaf=self.SMALLEST, random_state=0)
        self.tree = tree.fit(observations, actions).tree_
        return self

    def predict(self, observations: Array, progress: Array) -> Array:
        values: Array = self.tree.predict(observations.astype(np.float32))[:, 0]
        return values

    def rules(self, observations: Sequence[str]) -> list[str]:
        return self._leaves(0, {}, observations)

    def _leaves(self, node: int, box: Mapping[str, tuple[float, float]], names: Sequence[str]) -> list[str]:
        tree = self.tree
        left, right = tree.children_left[node], tree.children_right[node]
        if left == right:
            where = ", ".join(_interval(name, *bounds) for name, bounds in box.items()) or "always"
            share = tree.n_node_samples[node] / tree.n_node_samples[0]
            return [f"{signed(tree.value[node].item())} in {share:4.0%}: {where}"]
        name, threshold = names[tree.feature[node]], float(tree.threshold[node])
        low, high = box.get(name, (-np.inf, np.inf))
        return [
            *self._leaves(left, {**box, name: (low, min(high, threshold))}, names),
            *self._leaves(right, {**box, name: (max(low, threshold), high)}, names),
        ]


class SparseLinear(Surrogate):
    """A weighted sum of a few observations: one for the beginning of a run, where actions may move a control further,
    and another for the rest.

    The observations are those that are left as the weakest is taken out, again and again (recursive elimination).
    """

    name = "linear"
    TERMS = 8
    PENALTY = 0.03  # on the squares of the weights of standardised observations, or those that tell nearly the same
    # (progress and the decisions that are left) get large weights against each other
    PHASES = ((-np.inf, EARLY), (EARLY, np.inf))  # of the progress

    def fit(self, observations: Array, progress: Array, actions: Array) -> Surrogate:
        self.models: list[tuple[Array, float]] = []  # weights and intercept
        for low, high in self.PHASES:
            rows = (progress >= low) & (progress < high)
            self.models.append(self._fitted(observations[rows], actions[rows]))
        return self

    def _fitted(self, x: Array, y: Array) -> tuple[Array, float]:
        if not len(y):
            return np.zeros(x.shape[1]), 0.0
        terms = min(self.TERMS, x.shape[1])
        scaler, chosen = StandardScaler(), RFE(Ridge(alpha=self.PENALTY * len(y)), n_features_to_select=terms)
        chosen.fit(scaler.fit_transform(x), y)
        weights = np.zeros(x.shape[1])
        weights[chosen.support_] = chosen.estimator_.coef_
        weights /= scaler.scale_
        return weights, float(chosen.estimator_.intercept_ - weights @ scaler.mean_)

    def predict(self, observations: Array, progress: Array) -> Array:
        actions = np.zeros(len(progress))
        for (low, high), (weights, intercept) in zip(self.PHASES, self.models, strict=True):
            rows = (progress >= low) & (progress < high)
            actions[rows] = observations[rows] @ weights + intercept
        return actions

    def rules(self, observations: Sequence[str]) -> list[str]:
        lines = []
        for (_, high), (weights, intercept) in zip(self.PHASES, self.models, strict=True):
            when = f"first {EARLY:.0%} of the run" if high == EARLY else "later"
            order = [i for i in np.argsort(-np.abs(weights)) if weights[i]]
            terms = [f"{'−' if weights[i] < 0 else '+'} {abs(weights[i]):.2f} {observations[i]}" for i in order]
            lines.append(f"{when}: {' '.join([signed(intercept).removeprefix('+'), *terms])}")
        return lines


SURROGATES: Mapping[str, type[Surrogate]] = {kind.name: kind for kind in (Tree, SparseLinear)}


class Fidelity(NamedTuple):
    """How a surrogate of other runs predicts the actions of a run."""

    r2: float  # 1 where it is exact, 0 where it is no better than the mean; NaN where all actions are the same
    same_sign: float  # share of the decisions in which it moves the control the same way
    predicted: Array  # (n,)


class Rules(NamedTuple):
    """A surrogate of one action."""

    control: str
    kind: str  # in `SURROGATES`
    fidelity: Fidelity
    lines: list[str]


def fidelity(kind: type[Surrogate], observations: Array, progress: Array, actions: Array, run: Any) -> Fidelity:
    """How faithful a surrogate is to the actions of runs that it has not met.

    Args:
        kind: of surrogate.
        observations: (n, observations).
        progress, actions: (n,).
        run: (n,), to which run a decision belongs; those of a run are held out together.

    Raises:
        ValueError: there is only one run.
    """
    runs = len(set(run.tolist()))
    if runs < 2:
        raise ValueError("the fidelity of rules shows on runs that they were not made of, and there is only one run")
    predicted = np.zeros(len(actions))
    for known, held_out in GroupKFold(min(FOLDS, runs)).split(observations, groups=run):
        surrogate = kind().fit(observations[known], progress[known], actions[known])
        predicted[held_out] = surrogate.predict(observations[held_out], progress[held_out])
    spread = float(((actions - actions.mean()) ** 2).sum())
    r2 = 1 - float(((actions - predicted) ** 2).sum()) / spread if spread > 1e-12 else np.nan
    return Fidelity(r2, float((np.sign(predicted) == np.sign(actions)).mean()), predicted)


def surrogates(controls: Sequence[str], names: Sequence[str], decisions: Decisions) -> list[Rules]:
    """Surrogates of each kind for each control, made of all decisions, the most faithful of a control first.

    Args:
        controls: of the policy.
        names: of its observations.
        decisions: of at least two runs.

    Raises:
        ValueError: there is only one run.
    """
    observations, progress = decisions.observations.double().numpy(), decisions.progress
    found = []
    for i, control in enumerate(controls):
        actions = decisions.actions[:, i].double().numpy()
        rules = []
        for name, kind in SURROGATES.items():
            faithful = fidelity(kind, observations, progress, actions, decisions.run)
            lines = kind().fit(observations, progress, actions).rules(names)
            rules.append(Rules(control, name, faithful, lines))
        found += sorted(rules, key=lambda each: -np.nan_to_num(each.fidelity.r2, nan=-np.inf))
    return found


def signed(number: float) -> str:
    """With two digits and its sign."""
    return f"{round(number, 2) + 0.0:+.2f}".replace("-", "−")


def _interval(name: str, low: float, high: float) -> str:
    if low == -np.inf:
        text = f"{name} ≤ {high:.2f}"
    else:
        text = f"{name} > {low:.2f}" if high == np.inf else f"{low:.2f} < {name} ≤ {high:.2f}"
    return text.replace("-", "−")
