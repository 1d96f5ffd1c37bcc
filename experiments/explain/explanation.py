"""An explanation of a policy's decisions: its numbers, as tables, pictures and a story."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlsched.agents.explain.attribution import Attribution, attribute, importance, importance_over_run
from rlsched.agents.explain.decisions import Decisions
from rlsched.agents.explain.figures import decisions_figure, fidelity_figure, importance_figure, response_figure
from rlsched.agents.explain.response import Response, responses
from rlsched.agents.explain.surrogate import FOLDS, Rules, signed, surrogates
from rlsched.experiments.table import markdown, save
from rlsched.files import write
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATIONS

PAGE, DATA = "explanation.md", "explanation.json"
DECISIONS, ATTRIBUTIONS = "decisions.csv", "attributions.csv"
IMPORTANCE, RESPONSES = "importance.csv", "responses.csv"
MOST_PICTURES = 8  # of single courses
TOP = 5  # features in the story
WIDTH = 110  # characters of a line of the story


class Explanation(NamedTuple):
    """Why a policy decided so."""

    policy: SchedulePolicy
    name: str  # of the policy
    source: str  # where the decisions come from, in words
    decisions: Decisions
    attribution: Attribution
    responses: dict[str, Response]  # by observation
    rules: list[Rules]  # the most faithful of a control first; none where there is only one run

    @property
    def importance(self) -> NDArray[np.float64]:
        """(controls, features)"""
        return importance(self.attribution)

    def order(self, control: int) -> list[int]:
        """The features, as places in `attribution.features`, the most important first."""
        return [int(i) for i in np.argsort(-self.importance[control], kind="stable")]

    def direction(self, control: int, feature: str) -> str:
        """What more of a feature does to an action."""
        return self.responses[feature].direction(control) if feature in self.responses else "–"

    # --- In words -------------------------------------------------------------------------------------------------

    def story(self) -> str:
        """All of it on a screen."""
        policy, decisions = self.policy, self.decisions
        lines = [
            f"policy     {self.name}: {policy!r}",
            f"decisions  {len(decisions.steps):,} {self.source}",
            "actions    as they are before they are clipped to [−1, 1]. The influence of the policy's domain, which",
            f"           scales them afterwards, was below 1 in {float((decisions.influence < 1).float().mean()):.1%}",
        ]
        best = {each.control: each for each in reversed(self.rules)}
        for i, control in enumerate(policy.controls):
            actions = decisions.actions[:, i].double().numpy()
            lines += ["", f"{control.upper()}  {self._in_numbers(i, actions)}"]
            total = self.importance[i].sum() or 1.0
            owed = [
                f"{self.attribution.features[k]} {self.importance[i][k] / total:.0%}"
                f" ({self.direction(i, self.attribution.features[k])})"
                for k in self.order(i)[:TOP]
            ]
            lines += _wrapped(f"owed to (and what more of it does): {', '.join(owed)}")
            if control in best:
                rules = best[control]
                lines += _wrapped(f"nearly ({rules.kind}, {_in_words(rules)}):")
                for line in rules.lines:
                    lines += _wrapped(line, "    ")
        if not self.rules:
            lines += ["", *_wrapped(ONE_RUN, "")]
        return "\n".join(lines)

    def _in_numbers(self, i: int, actions: NDArray[np.float64]) -> str:
        beyond = float((np.abs(actions) > 1).mean())
        return (
            f"mean action {signed(actions.mean())} ± {actions.std():.2f}, "
            f"{signed(self.attribution.baseline_action[i])} at a typical observation, beyond ±1 in {beyond:.0%}"
        )

    def page(self, pictures: Sequence[Path] = ()) -> str:
        """The whole as Markdown, with links to pictures that lie beside it."""
        parts = ["# Why the policy decided so", f"```text\n{self.story()}\n```"]
        controls, features, whole = self.policy.controls, self.attribution.features, self.importance
        parts += [
            "## What actions owe to what was seen",
            "Mean size of the attribution, in units of the action before it is clipped, and what more of the "
            "observation does to the action. The attributions of a decision sum to its action minus that at a typical "
            f"observation: here they are off by {self.attribution.error:.0e} at most. – marks what never changed.",
        ]
        order = np.argsort(-whole.sum(0), kind="stable")
        rows = [
            [f"`{features[k]}`", *(f"{whole[i, k]:.3f} {self.direction(i, features[k])}" for i in range(len(controls)))]
            for k in order
        ]
        parts.append(markdown(["observation", *controls], rows))
        parts += ["## Rules that say nearly the same"]
        if self.rules:
            parts.append(
                f"Made of all decisions. How faithful they are shows on runs that they were not made of: the "
                f"{_runs(self)} runs are in {min(FOLDS, _runs(self))} parts, and each part is predicted by rules of "
                "the others. R² is 1 where the actions are predicted exactly, and 0 where no better than by their mean."
            )
            rows = [
                [each.control, each.kind, _r2(each.fidelity.r2), f"{each.fidelity.same_sign:.0%}"]
                for each in self.rules
            ]
            parts.append(markdown(["control", "rules", "R²", "equal signs"], rows, labels=2))
            for each in self.rules:
                text = "\n".join(each.lines)
                parts.append(f"**{each.control}, {each.kind}** ({_in_words(each)})\n\n```text\n{text}\n```")
        else:
            parts.append(ONE_RUN)
        parts += ["## What the observations mean"]
        seen = self.decisions.observations.double().numpy()
        rows = [
            [
                f"`{name}`",
                OBSERVATIONS[name].meaning,
                f"{self.attribution.baseline[k]:.2f}",
                " … ".join(f"{value:.2f}" for value in np.quantile(seen[:, k], [0.05, 0.95])),
            ]
            for k, name in enumerate(self.policy.observations)
        ]
        parts.append(markdown(["observation", "meaning", "typical", "seen, 5 % … 95 %"], rows, labels=2))
        if pictures:
            parts += ["## Pictures", *(f"![{path.stem}]({path.name})" for path in pictures)]
        return "\n\n".join(parts) + "\n"

    # --- On disk --------------------------------------------------------------------------------------------------

    def publish(self, out: Path) -> str:
        """Write it all to a folder; returns the story, and where the rest is.

        Raises:
            OSError: it cannot be written.
        """
        pictures = [save(figure, out / f"{name}.png") for name, figure in self.figures()]
        write(out / DECISIONS, _csv(self._decisions()))
        write(out / ATTRIBUTIONS, _csv(self._attributions()))
        write(out / IMPORTANCE, _csv(self._importance()))
        write(out / RESPONSES, _csv(self._responses()))
        write(out / DATA, json.dumps(self.data(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        page = write(out / PAGE, self.page(pictures).encode())
        tables = " ".join((DATA, DECISIONS, ATTRIBUTIONS, IMPORTANCE, RESPONSES))
        shown = " ".join(path.name for path in pictures)
        return f"{self.story()}\n\npage       {page}\ntables     {tables}\npictures   {shown}"

    def figures(self, courses: int = MOST_PICTURES) -> Iterator[tuple[str, Figure]]:
        """Its pictures, with their names, in the order in which to look at them.

        Args:
            courses: the most that have a picture of their single decisions. Of episodes it is at most one.
        """
        controls, decisions, names = self.policy.controls, self.decisions, self.policy.observations
        yield "importance", importance_figure(controls, self.attribution, decisions)
        are_runs = not decisions.courses[0].startswith("episode")
        for course in range(min(courses, len(decisions.courses) if are_runs else 1)):
            yield f"decisions-{course + 1}", decisions_figure(controls, self.attribution, decisions, course)
        features = self.attribution.features
        for i, control in enumerate(controls):
            order = [features[k] for k in self.order(i) if features[k] in self.responses]
            if order:
                yield f"response-{control}", response_figure(control, i, self.responses, order, decisions, names)
        if self.rules:
            yield "fidelity", fidelity_figure(controls, self.rules, decisions)

    def data(self) -> dict[str, Any]:
        """What a program may want of it, but for single decisions and curves, for which there are CSV tables."""
        features, whole = self.attribution.features, self.importance
        return {
            "policy": {"name": self.name, "sha256": self.policy.digest},
            "source": self.source,
            "decisions": len(self.decisions.steps),
            "runs": _runs(self),
            "influence_below_1": float((self.decisions.influence < 1).double().mean()),
            "completeness_error": self.attribution.error,
            "typical": dict(zip(self.policy.observations, self.attribution.baseline.tolist(), strict=True)),
            "controls": {
                control: {
                    "action_at_typical": float(self.attribution.baseline_action[i]),
                    "mean_action": float(self.decisions.actions[:, i].double().mean()),
                    "beyond_1": float((self.decisions.actions[:, i].abs() > 1).double().mean()),
                    "importance": {features[k]: float(whole[i, k]) for k in self.order(i)},
                    "direction": {name: response.direction(i) for name, response in self.responses.items()},
                    "rules": {
                        each.kind: {
                            "r2": each.fidelity.r2 if math.isfinite(each.fidelity.r2) else None,
                            "same_sign": each.fidelity.same_sign,
                            "lines": each.lines,
                        }
                        for each in self.rules
                        if each.control == control
                    },
                }
                for i, control in enumerate(self.policy.controls)
            },
        }

    def _decisions(self) -> Iterable[Sequence[Any]]:
        decisions = self.decisions
        yield ["course", "step", "progress", "influence", *self.policy.observations]
        for n in range(len(decisions.steps)):
            yield [*self._where(n), *_short([decisions.influence[n], *decisions.observations[n]])]

    def _attributions(self) -> Iterable[Sequence[Any]]:
        decisions, applied = self.decisions, self.decisions.applied
        yield ["course", "step", "progress", "control", "action", "applied", "at_typical", *self.attribution.features]
        for n in range(len(decisions.steps)):
            for i, control in enumerate(self.policy.controls):
                numbers = [decisions.actions[n, i], applied[n, i], self.attribution.baseline_action[i]]
                yield [*self._where(n), control, *_short(numbers), *_short(self.attribution.values[n, i])]

    def _where(self, n: int) -> list[Any]:
        decisions = self.decisions
        return [decisions.courses[decisions.course[n]], decisions.steps[n], f"{decisions.progress[n]:.4f}"]

    def _importance(self) -> Iterable[Sequence[Any]]:
        over_run = importance_over_run(self.attribution, self.decisions.progress)
        tenths = [f"{10 * k}–{10 * k + 10} %" for k in range(len(over_run))]
        yield ["control", "observation", "all", *tenths]
        for i, control in enumerate(self.policy.controls):
            for k in self.order(i):
                yield [control, self.attribution.features[k], *_short([self.importance[i, k], *over_run[:, i, k]])]

    def _responses(self) -> Iterable[Sequence[Any]]:
        yield ["control", "observation", "value", "mean", "low", "high", "all_else_typical"]
        for i, control in enumerate(self.policy.controls):
            for name, response in self.responses.items():
                curves = (response.mean, response.low, response.high, response.typical)
                for p, value in enumerate(response.values):
                    yield [control, name, *_short([value, *(curve[p, i] for curve in curves)])]


ONE_RUN = (
    "There are no rules: how faithful they are shows on runs that they were not made of, and there is only one run. "
    "Without --run they are made of episodes."
)


def explanation(
    policy: SchedulePolicy, name: str, decisions: Decisions, source: str, *, show: bool = False
) -> Explanation:
    """Explain decisions of a policy.

    Args:
        policy: that decided.
        name: what to call it.
        decisions: to explain.
        source: where they come from, in words.
        show: a progress bar.
    """
    several = len(set(decisions.run.tolist())) > 1
    return Explanation(
        policy,
        name,
        source,
        decisions,
        attribute(policy, decisions, show=show),
        responses(policy, decisions),
        surrogates(policy.controls, policy.observations, decisions) if several else [],
    )


def _runs(explained: Explanation) -> int:
    return len(set(explained.decisions.run.tolist()))


def _in_words(rules: Rules) -> str:
    return f"R² {_r2(rules.fidelity.r2)} and {rules.fidelity.same_sign:.0%} equal signs on runs held out"


def _r2(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")


def _short(numbers: Iterable[Any]) -> list[str]:
    return [f"{float(number):.6g}" if math.isfinite(float(number)) else "" for number in numbers]


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
