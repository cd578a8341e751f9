"""A run trusts no kernel that was not checked: what is kept, what is joined, what follows."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from step_jax.core.errors import KernelError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.tokens import Tokens
from step_jax.ops import attention, decode_attention, registry
from step_jax.ops.selfcheck import Verdict
from step_jax.runs import kernel_check
from tests.models import small

NAME = "pallas_tpu_interpret"
MODEL = small.decoder(MFA(4, 128), width=128, repeat=1)
TOKENS = 256


@pytest.fixture(autouse=True)
def nothing_kept_or_distrusted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    registry.distrust({})


@pytest.fixture
def here(monkeypatch):
    """``auto`` takes interpreted kernels on this CPU."""
    for module in (attention, decode_attention):
        monkeypatch.setitem(module.OPERATION.automatic, "cpu", (NAME,))


class Judge:
    """In the place of ``judge``: finds what it is told to find, and counts."""

    def __init__(self, wrong: str = "", trouble: str = ""):
        self.wrong, self.trouble, self.asked = wrong, trouble, []

    def __call__(self, cases, device):
        self.asked += cases
        return [self.verdict(case) for case in cases]

    def verdict(self, case) -> Verdict:
        bad = case.operation.name == self.wrong
        return Verdict(
            f"{case.operation.name} {case.implementation}", case.shapes(), 0.5 if bad else 1e-7,
            1e-3, "o", True, 1.0, self.trouble if bad else "",
        )  # fmt: skip


@pytest.fixture
def judge(monkeypatch):
    def use(**options):
        made = Judge(**options)
        monkeypatch.setattr(kernel_check, "judge", made)
        return made

    return use


def one_device():
    return Sharding.build(MeshConfig(), jax.devices()[:1])


def trusted(execution=None, said=None, model=MODEL, tokens=TOKENS):
    execution = Execution(dtype="float32") if execution is None else execution
    said = [] if said is None else said
    return kernel_check.trusted(model, execution, tokens, one_device(), said.append)


def test_where_xla_computes_everything_nothing_is_asked_and_nothing_is_said(judge):
    found, said = judge(), []
    chosen = trusted(said=said)
    assert chosen == {"attention": "auto -> xla", "loss": "auto -> chunked"}
    assert (found.asked, said) == ([], [])


def test_a_verdict_is_asked_for_once_and_kept(here, judge):
    found = judge()
    chosen = trusted()
    assert [case.operation.name for case in found.asked] == [
        "attention", "attention", "decode attention",
    ]  # fmt: skip
    assert chosen["attention"] == f"auto -> {NAME}"
    assert chosen["kernels"].startswith("right; 3 shapes checked in ")
    again = judge()
    assert trusted()["kernels"] == "right; 3 shapes checked before"
    assert again.asked == []


@pytest.mark.parametrize("change", ["kernel", "version", "flags", "shape", "damaged file"])
def test_another_kernel_version_or_shape_is_asked_about_again(
    change, here, judge, monkeypatch, tmp_path
):
    source = tmp_path / "sources" / "kernel.py"
    source.parent.mkdir()
    source.write_text("p = exp2(s - m)")
    monkeypatch.setattr(kernel_check, "SOURCES", (source.parent,))
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    judge()
    trusted()
    model = MODEL
    if change == "kernel":
        source.write_text("p = exp2(s - m + 1)")
    elif change == "version":
        monkeypatch.setattr(kernel_check.jaxlib, "__version__", "0.0.1")
    elif change == "flags":
        monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=1")
    elif change == "shape":
        model = small.decoder(MFA(8, 128), width=128, repeat=1)
    else:
        for file in (tmp_path / "step_jax" / "kernels").iterdir():
            file.write_text('{"kernel": "at')
    again = judge()
    trusted(model=model)
    assert len(again.asked) == 3


def test_what_a_kernel_raised_is_not_kept(here, judge):
    judge(wrong="attention", trouble="XlaRuntimeError: RESOURCE_EXHAUSTED")
    trusted()
    again = judge()
    assert trusted()["attention"] == f"auto -> {NAME}"
    assert {case.operation.name for case in again.asked} == {"attention"}


def test_auto_goes_without_a_kernel_that_is_wrong_and_says_so(here, judge, monkeypatch):
    """In what is traced afterwards: attention by XLA, decoding still by its kernel."""
    judge(wrong="attention")
    said = []
    chosen = trusted(said=said)
    assert chosen["attention"] == "auto -> xla"
    assert chosen["kernels"].startswith("1 WRONG, see the log; 3 shapes")
    assert said == [
        f"KERNEL NOT TRUSTED: attention {NAME}: o has an error of 0.5 with 4 heads on 1 of 128, "
        "256 tokens, float32 (at most 0.001); this run computes without it, on all hosts. "
        "`step-jax doctor RECIPE` checks again"
    ]
    used = kernels_traced(monkeypatch)
    assert used == []
    assert decode_attention.resolve("auto", decode_problem(), jax.devices()[0]) == NAME
    trusted()  # the next run starts from what is kept
    assert kernels_traced(monkeypatch) == []
    judge()
    for file in kernel_check.cache_folder("kernels").iterdir():
        file.unlink()
    assert trusted()["attention"] == f"auto -> {NAME}"
    assert kernels_traced(monkeypatch) != []


def kernels_traced(monkeypatch) -> list:
    """The calls of the attention kernel in a forward pass."""
    from pallas_kernels.tpu import attention as kernel

    calls, compute = [], kernel.attention

    def counted(*arguments, **options):
        calls.append(options)
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "attention", counted)
        ctx = Context(Tokens.in_order(1, TOKENS), execution=Execution(dtype="float32"))
        tokens = jax.ShapeDtypeStruct((1, TOKENS), "int32")
        jax.eval_shape(lambda p, t: MODEL.hidden(p, t, ctx), small.params(MODEL), tokens)
    return calls


def decode_problem():
    from step_jax.ops.selfcheck import Decode
    from step_jax.ops.selfcheck.verdicts import inputs_like

    (call,) = inputs_like(Decode(NAME, 4, 1, 128, 200, dtype="float32"))
    return decode_attention.Problem(call)


def test_a_kernel_that_was_named_and_is_wrong_ends_the_run(judge):
    judge(wrong="attention")
    with pytest.raises(KernelError) as error:
        trusted(Execution(dtype="float32", attention=NAME))
    for part in (
        f"execution.attention names {NAME}", "on host 0", "an error of 0.5", "170 tokens",
        "execution.attention: auto, or xla", "step-jax doctor",
    ):  # fmt: skip
        assert part in str(error.value)


class Hosts(SimpleNamespace):
    """Two processes in the place of ``Processes``: this one, and one that finds something else."""

    def together(self, key, local, lead):
        found, made = local()
        return json.loads(json.dumps(lead([(found, made), (self.other(found), 0)])))

    def forget(self, key):
        pass


def test_what_is_wrong_on_one_host_is_used_on_none(here, judge, monkeypatch):
    def other(found):
        return [dict(v, host=1, error=float("nan"), worst="dq") for v in found]

    monkeypatch.setattr(kernel_check, "Processes", lambda name: Hosts(other=other))
    judge()
    said = []
    assert trusted(said=said)["attention"] == "auto -> xla"
    assert len(said) == 2 and "dq has NaN" in said[0]
    with pytest.raises(KernelError, match="wrong on host 1: dq has NaN"):
        trusted(Execution(dtype="float32", attention=NAME))


def test_hosts_that_check_other_kernels_are_refused(here, judge, monkeypatch):
    monkeypatch.setattr(
        kernel_check, "Processes", lambda name: Hosts(other=lambda found: found[:1])
    )
    judge()
    with pytest.raises(KernelError, match="other configurations, versions or devices"):
        trusted()


def test_every_field_of_a_verdict_is_kept(here, judge):
    judge()
    trusted()
    (first, *_) = sorted(kernel_check.cache_folder("kernels").iterdir())
    fields = {field.name for field in dataclasses.fields(Verdict)}
    assert set(json.loads(first.read_text())["content"]) == fields
