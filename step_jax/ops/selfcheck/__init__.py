"""Whether kernels compute here what they say: see :mod:`step_jax.ops.selfcheck.verdicts`."""

from step_jax.ops.selfcheck.attention import Attention
from step_jax.ops.selfcheck.case import Case
from step_jax.ops.selfcheck.decode import Decode
from step_jax.ops.selfcheck.products import CrossEntropy, GroupedMatmul
from step_jax.ops.selfcheck.verdicts import Verdict, judge

__all__ = ["Attention", "Case", "CrossEntropy", "Decode", "GroupedMatmul", "Verdict", "judge"]
