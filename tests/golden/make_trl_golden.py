"""Makes trl_losses.npz, which the tests of preference losses and RL objectives compare with.

Command (needs `torch==2.13.0` and `trl==1.16.0`; no network, half a minute):

    python tests/golden/make_trl_golden.py

TRL's own methods compute every loss, in float64 (ORPO's in float32, whatever it is given), from
log-probabilities in the place of a model's; a mock stands in for the trainer around a method.
The file holds (B pairs: 2B rows, the chosen first; T tokens):

  logps, mask, reference, old, behaviour, entropy, advantages
                      what goes in; (2B, T), the mask 1 for tokens of the answer; advantages (2B,)
  unrelated, unrelated_reference   (2B,), of answers that belong to other prompts (KTO)
  scores              (2B,), of a reward model, or rewards
  NAME/loss, NAME/gradient     the loss, and its gradient by logps (by scores for reward_model)
  advantages/grpo, advantages/dr_grpo, advantages/rloo     from scores, in groups of four rows
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import nanstd

FILE = Path(__file__).parent / "trl_losses.npz"
PAIRS, TOKENS, GROUP = 4, 6, 4


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = (2 * PAIRS, TOKENS)
    lengths = rng.integers(2, TOKENS + 1, 2 * PAIRS)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.float64)
    logps = -rng.exponential(0.8, shape) * mask

    def near(spread):
        return np.minimum(logps + spread * rng.standard_normal(shape), -1e-3) * mask

    arrays = {
        "logps": logps,
        "mask": mask,
        "reference": near(0.4),
        "old": near(0.3),
        "behaviour": near(0.05),
        "entropy": rng.exponential(1.0, shape) * mask,
        "advantages": rng.standard_normal(2 * PAIRS),
        "unrelated": -rng.exponential(6.0, 2 * PAIRS),
        "scores": rng.standard_normal(2 * PAIRS),
    }
    arrays["unrelated_reference"] = arrays["unrelated"] - rng.exponential(1.0, 2 * PAIRS)
    # what is stored is what is computed from
    return {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}


def trainer(**settings) -> MagicMock:
    mock = MagicMock()
    mock.accelerator.gather_for_metrics.side_effect = lambda a: a
    mock.accelerator.gather.side_effect = lambda a: a
    mock.accelerator.reduce.side_effect = lambda a, **_: a
    mock.accelerator.device = torch.device("cpu")
    mock.accelerator.num_processes = 1
    for name, value in ({"aux_loss_enabled": False, "beta": 0.1} | settings).items():
        setattr(mock, name, value)
    return mock


def outputs(logps) -> SimpleNamespace:
    """What a model says of rows whose first token is a prompt's."""
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )


def with_prompt(mask):
    return torch.cat([torch.zeros(len(mask), 1), mask], dim=1)


def dpo(a, logps, loss_type: str, **settings):
    mask = with_prompt(a["mask"])
    total = a["reference"].sum(1).chunk(2)
    batch = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": total[0],
        "ref_rejected_logps": total[1],
    }
    fake = trainer(
        loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, precompute_ref_logps=True, label_smoothing=0.0, **settings,
    )  # fmt: skip
    return DPOTrainer._compute_loss(fake, lambda **_: outputs(logps), batch, False)


def cdpo(a, logps, e=0.1):
    """TRL 1.16 smooths labels in CPO alone: fed log-ratios, its loss is cDPO's."""
    ratio = (logps - a["reference"]).sum(1).chunk(2)
    fake = trainer(alpha=0.0, loss_type="sigmoid", label_smoothing=e)
    return CPOTrainer.cpo_loss(fake, *ratio)[0].mean()


def simpo(a, logps):
    mean = (logps.sum(1) / a["mask"].sum(1)).chunk(2)
    fake = trainer(alpha=0.0, loss_type="simpo", label_smoothing=0.0, beta=2.0, simpo_gamma=1.0)
    return CPOTrainer.cpo_loss(fake, *mean)[0].mean()


def orpo(a, logps):
    count = a["mask"].sum(1)
    mean, chosen = (logps.sum(1) / count).chunk(2), logps.chunk(2)[0]
    nll = -chosen.sum() / count.chunk(2)[0].sum()
    return nll - ORPOTrainer.odds_ratio_loss(trainer(), *mean)[0].mean()


def kto(a, logps):
    mask = with_prompt(a["mask"])
    batch = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.arange(2 * PAIRS) < PAIRS + 1,
        "ref_logps": a["reference"].sum(1),
        "ref_KL_logps": a["unrelated_reference"],
    }
    fake = trainer(
        calculate_KL=True, loss_type="kto", precompute_ref_logps=True,
        desirable_weight=1.0, undesirable_weight=1.5,
    )  # fmt: skip
    fake._compute_kl_logps.side_effect = lambda *_: a["unrelated"]
    return KTOTrainer._compute_loss(fake, lambda **_: outputs(logps), batch, False)


def grpo(a, logps, loss_type: str, level="token", beta=0.0, low=0.2, high=0.2, weight=None):
    fake = trainer(
        beta=beta, loss_type=loss_type, importance_sampling_level=level, epsilon_low=low,
        epsilon_high=high, max_completion_length=TOKENS, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1,
        use_vllm=weight is not None, vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
    )  # fmt: skip
    fake.args.delta, fake.args.use_bias_correction_kl = None, False
    fake.args.steps_per_generation = 1
    fake._get_per_token_logps_and_entropies.return_value = (logps, a["entropy"], None)
    batch = {
        "prompt_ids": torch.zeros(2 * PAIRS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(2 * PAIRS, 1),
        "completion_ids": torch.zeros(a["mask"].shape, dtype=torch.long),
        "completion_mask": a["mask"],
        "advantages": a["advantages"],
        "old_per_token_logps": a["old"],
        "ref_per_token_logps": a["reference"],
        "num_items_in_batch": a["mask"].sum(),
        "importance_sampling_ratio": weight,
    }
    return GRPOTrainer._compute_loss(fake, None, batch)


def advantages(scores) -> dict[str, torch.Tensor]:
    """The lines of GRPOTrainer and RLOOTrainer that follow the rewards."""
    groups = scores.view(-1, GROUP)
    above = groups - groups.mean(1, keepdim=True)
    others = (groups.sum(1, keepdim=True) - groups) / (GROUP - 1)
    return {
        "grpo": above / (nanstd(groups, dim=1)[:, None] + 1e-4),
        "dr_grpo": above,
        "rloo": groups - others,
    }


def main():
    torch.set_default_dtype(torch.float64)
    arrays = inputs()
    a = {name: torch.from_numpy(value) for name, value in arrays.items()}
    between = torch.exp(a["old"] - a["behaviour"])
    losses = {
        "dpo": lambda x: dpo(a, x, "sigmoid"),
        "cdpo": lambda x: cdpo(a, x),
        "ipo": lambda x: dpo(a, x, "ipo"),
        "orpo": lambda x: orpo(a, x),
        "simpo": lambda x: simpo(a, x),
        "kto": lambda x: kto(a, x),
        "grpo": lambda x: grpo(a, x, "grpo", beta=0.04),
        "dr_grpo": lambda x: grpo(a, x, "dr_grpo"),
        "dapo": lambda x: grpo(a, x, "dapo", high=0.28),
        "gspo": lambda x: grpo(a, x, "grpo", level="sequence", low=3e-4, high=4e-4),
        "cispo": lambda x: grpo(a, x, "cispo", high=1.2),
        "truncated": lambda x: grpo(a, x, "dapo", weight=between.clamp(max=1.1)),
    }
    for name, loss in losses.items():
        x = a["logps"].clone().requires_grad_()
        value = loss(x)
        value.backward()
        arrays[f"{name}/loss"], arrays[f"{name}/gradient"] = value.detach().numpy(), x.grad.numpy()
    x = a["scores"].clone().requires_grad_()
    chosen, rejected = x.chunk(2)
    value = -logsigmoid(chosen - rejected).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
    value.backward()
    arrays["reward_model/loss"] = value.detach().numpy()
    arrays["reward_model/gradient"] = x.grad.numpy()
    for name, value in advantages(a["scores"]).items():
        arrays[f"advantages/{name}"] = value.reshape(-1).numpy()
    np.savez_compressed(FILE, **{name: np.asarray(value) for name, value in arrays.items()})


if __name__ == "__main__":
    main()
