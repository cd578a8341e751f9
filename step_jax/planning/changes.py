"""What a plan would become with another batch, sequence, remat policy or number of microbatches.

Estimated from shapes (``planning.estimate``), the plan's own recipe too: it is the differences that
are of use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from step_jax.core.errors import StepError
from step_jax.models.context import RematPolicy
from step_jax.planning.case import case_of
from step_jax.planning.compiled import Loop, execution_of, resolved
from step_jax.planning.plan import Plan
from step_jax.planning.search import Estimator, with_accumulation, with_remat
from step_jax.planning.topology import Topology


@dataclass(frozen=True)
class Changed:
    """A variant of a recipe, estimated.

    nbytes: of a device. step_s: of a step. rate: tokens per second and chip.
    """

    change: str
    nbytes: float
    step_s: float
    rate: float
    mfu: float


def with_changes(plan: Plan, loop: Loop, config: Any, topology: Topology) -> Plan:
    """A plan with the recipe that it is of, as it stands and with each change."""
    return replace(plan, changes=[asdict(c) for c in changes(loop, config, topology)])


def changes(loop: Loop, config: Any, topology: Topology) -> list[Changed]:
    """The recipe as it stands, and what is near it; nothing for what has no estimates."""
    config = resolved(config, topology.count)
    own = _estimator(loop, config, topology)
    if topology.chip is None or own is None:
        return []
    found = []
    for change, variant in _variants(config):
        # an estimator holds on to the batch of its recipe
        at = own if _batch(variant) == _batch(config) else _estimator(loop, variant, topology)
        proposal = None if at is None else at(variant)
        if proposal is not None:
            p = proposal
            found.append(Changed(change, p.nbytes, p.step_s, p.rate, p.mfu))
    return found


def _batch(config: Any) -> tuple[Any, Any]:
    """(rows of a batch, their length); None for what a loop has not."""
    rows = getattr(config.training, "batch_size", None)
    return rows, getattr(config.data, "sequence_length", None)


def _estimator(loop: Loop, config: Any, topology: Topology) -> Estimator | None:
    """None for a loop that trains no decoder of texts, or sizes that cannot be."""
    try:
        found = Estimator(loop, config, topology)
        return None if case_of(found.own, execution_of(config)) is None else found
    except StepError:
        return None


def _variants(config: Any) -> Iterator[tuple[str, Any]]:
    """(what is changed, the configuration)."""
    yield "as it stands", config
    training, execution = config.training, config.execution
    for remat in get_args(RematPolicy):
        if remat != execution.remat:
            yield f"remat {remat}", replace(config, execution=with_remat(config, remat))
    count = getattr(training, "accumulation", 0)
    for other in (count * 2, count // 2):
        if other:
            yield f"accumulation {other}", with_accumulation(config, other)
    rows, length = _batch(config)
    if not (isinstance(rows, int) and isinstance(length, int)):
        return
    for times, word in ((2, "twice"), (0.5, "half")):
        batch = replace(training, batch_size=int(rows * times))
        yield f"{word} the batch", replace(config, training=batch)
        same = replace(training, batch_size=int(rows / times))
        data = replace(config.data, sequence_length=int(length * times))
        yield f"rows {word} as long", replace(config, training=same, data=data)
