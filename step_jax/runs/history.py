"""What a run has been through: how its processes left, and what it was trained with.

A run is started, stopped, killed and started again. Its records say what became of it
(:func:`outcome`); its configuration is that of the steps that it has done, which a later start
cannot change (:func:`continue_configuration`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import yaml

from step_jax.core.config import from_tree, to_yaml
from step_jax.core.errors import ConfigError, RestartRequested
from step_jax.core.yaml_strict import Mapping as Tree
from step_jax.core.yaml_strict import Node, Scalar, parse_yaml
from step_jax.runs.run_directory import RunDirectory

#: ``stopped``: saved after a SIGTERM; ``interrupted``: by Ctrl-C; ``failed``: by an error;
#: ``killed``: it left no word (a kill, a hang, a lost machine).
Status = Literal["not started", "running", "done", "stopped", "interrupted", "failed", "killed"]


class Outcome(NamedTuple):
    """``reason`` is the message of the error, empty if there was none."""

    status: Status
    reason: str = ""


def outcome(records: Sequence[Mapping[str, Any]], running: bool) -> Outcome:
    """What became of a run.

    Args:
      records: see :func:`step_jax.runs.metrics_log.read_metrics`.
      running: whether its directory is locked.
    """
    if running:
        return Outcome("running")
    found = Outcome("not started")
    for record in records:
        event = record["event"]
        if event == "end":
            found = Outcome(record["status"], record.get("reason", ""))
        elif event == "summary" and (status := record.get("values", {}).get("status")):
            found = Outcome(status)
        elif event in ("header", "resumed", "step"):
            found = Outcome("killed")  # unless a later record says how it left
    return found


def ending(error: BaseException | None) -> Outcome:
    """How a process leaves its run with this exception; None is its proper end."""
    if error is None:
        return Outcome("done")
    if isinstance(error, KeyboardInterrupt):
        return Outcome("interrupted")
    name = type(error).__name__
    status: Status = "stopped" if isinstance(error, RestartRequested) else "failed"
    return Outcome(status, f"{name}: {error}" if status == "failed" else str(error))


# --- what it was trained with -------------------------------------------------------------------

#: Groups that a run may continue with otherwise, because they do not say what is trained: where it
#: is written and watched, how it is computed, what is evaluated. Whatever is not named here stays,
#: so that a new setting is safe until somebody decides. ``data`` have a check of their own: they
#: may grow, but what was read must be the same.
MAY_CHANGE = (
    "run.directory",
    "run.max_skipped",
    "run.logging",
    "run.checkpoint",
    "run.profile",
    "execution",
    "parallel",
    "training.accumulation",
    "evaluation",
    "expert_health",
    "sample",
    "data",
)
#: How long the run is: not before the step that it has done, and not so that its learning rate
#: would have been another one.
_LENGTH = ("training.steps", "training.tokens")
#: What a branch may have otherwise besides.
_OF_A_BRANCH = ("run.branch_from", "optimizer.learning_rate", "optimizer.schedule")


class Branch(NamedTuple):
    """What a new run goes on from: ``RUN`` or ``RUN@STEP``, and the configuration kept there."""

    name: str
    config: Mapping[str, Any]


def flat_configuration(text: str, name: str = "config.yaml") -> dict[str, str]:
    """YAML text as key path -> text of the value."""
    flat: dict[str, str] = {}

    def walk(node: Node, key: str) -> None:
        if isinstance(node, Scalar):
            flat[key] = node.text
            return
        children = (
            node.entries.items()
            if isinstance(node, Tree)
            else ((str(i), item) for i, item in enumerate(node.items))
        )
        for child, value in children:
            walk(value, f"{key}.{child}" if key else child)

    walk(parse_yaml(text, name), "")
    return flat


def check_rates(
    learnings: Mapping[str, Any], rates: Mapping[str, float], step: int, run: object
) -> None:
    """Refuses a schedule by which the last finished step would have had another learning rate.

    A run that is made longer while its rate decays would jump back up; one whose rate is still
    constant, or that warms up, is the same run.

    Args:
      learnings: how each learner learns now.
      rates: of the step, as its metrics name them.
      step: finished steps.
      run: the run directory, for the message.

    Raises:
      ConfigError: names both rates, and how to branch.
    """
    for name, how in learnings.items():
        was = rates["lr" if len(learnings) == 1 else f"lr/{name}"]
        now = float(how.optimizer.rate(step - 1))
        if abs(now - was) > 1e-4 * how.optimizer.peak:
            raise ConfigError(
                f"step {step} of {run} had the learning rate {was:.4g}; with the length and "
                f"schedule given now it would have had {now:.4g}. Set them back to go on; a new "
                "run can go on from before the decay with any length: run.directory NEW and "
                f"run.branch_from {run}@STEP (step-jax checkpoints list {run} shows the steps)"
            )


def continue_configuration(
    directory: RunDirectory,
    config: Any,
    finished: int,
    total_steps: int,
    branch: Branch | None = None,
) -> list[str]:
    """Stores a run's configuration, if the run may go on with it.

    Nothing is written if it may not. One that differs is kept as ``config.1.yaml``,
    ``config.2.yaml`` and so on. Every process of the run calls this; the primary one writes.

    Args:
      directory: the open directory of the run.
      config: the resolved configuration of this start.
      finished: steps of the checkpoint that the run goes on after; after 0 everything may change.
      branch: what the checkpoint belongs to, if not to this run.
      total_steps: where the run ends now.

    Returns:
      One line for every setting that is another one from here on, to be reported as an event.

    Raises:
      ConfigError: the finished steps were made with other settings, or are more than
        ``total_steps``.
    """
    text = to_yaml(config)
    if branch:
        was = _flat_as(type(config), yaml.safe_dump(branch.config), branch.name)
    else:
        was = _stored(directory, config)
    now = flat_configuration(text)
    changed = [
        (key, was.get(key, "(not set)"), now.get(key, "(not set)"))
        for key in dict.fromkeys([*was, *now])
        if was and was.get(key) != now.get(key)
    ]
    if branch:  # that it is one is said already
        changed = [c for c in changed if c[0] not in ("run.directory", "run.branch_from")]
    if finished:
        _refuse(directory, changed, finished, total_steps, branch)
    kept = directory.write_config(text)
    where = f" (before: {kept.name})" if kept else ""
    return [
        f"{key} was {old} and is {new} after step {finished}{_consequence(key, finished)}{where}"
        for key, old, new in changed
    ]


def _stored(directory: RunDirectory, config: Any) -> dict[str, str]:
    """The stored configuration, flat; what it is too old to have stands at its default."""
    if not directory.config.exists():
        return {}
    text = directory.config.read_text(encoding="utf-8")
    return _flat_as(type(config), text, str(directory.config))


def _flat_as(kind: type, text: str, name: str) -> dict[str, str]:
    tree = parse_yaml(text, name)
    try:
        text = to_yaml(from_tree(kind, tree, check=False).config)
    except ConfigError:
        pass  # a setting that is no longer there: it will be named as changed
    return flat_configuration(text, name)


def _refuse(
    directory: RunDirectory,
    changed: Sequence[tuple[str, str, str]],
    finished: int,
    total: int,
    branch: Branch | None,
) -> None:
    free = (*MAY_CHANGE, *_LENGTH, *(_OF_A_BRANCH if branch else ()))
    run = branch.name if branch else directory.name
    told = {key: f"{key} was {was} and is {now}" for key, was, now in changed}
    fixed = [line for key, line in told.items() if not _is_under(key, free)]
    if fixed:
        raise ConfigError(
            f"{run} has finished {finished} steps with other settings than now "
            f"({directory.config.name}):\n  "
            + "\n  ".join(fixed)
            + "\nset them back to go on, or choose another run.directory for a new run"
        )
    if total < finished:
        lengths = [line for key, line in told.items() if _is_under(key, _LENGTH)]
        raise ConfigError(
            f"{run} has finished {finished} steps and would end at step {total}"
            + (f" ({', '.join(lengths)})" if lengths else "")
            + ": give it at least as many steps, or choose another run.directory for a new run"
        )


def _is_under(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _consequence(key: str, finished: int) -> str:
    if finished and _is_under(key, _LENGTH):
        return ", and so is the length that the learning rate's schedule goes by"
    return ""
