"""Tunix's GRPOLearner, held before it takes a batch until grpo.py asks for more."""

from __future__ import annotations

import protocol

shape = protocol.arguments()

import importlib.metadata  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import flax.nnx as nnx  # noqa: E402
import grpo_task  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402
from tunix.models.qwen3 import params as qwen3_params  # noqa: E402
from tunix.rl import algo_core, common, rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402

PHASES = protocol.Phases()
#: Neither can be written, so nothing ends and nothing is masked: prompts are equally long.
PAD, EOS = len(grpo_task.CHARACTERS), len(grpo_task.CHARACTERS) + 1


class Characters:
    """What the sampler needs of a tokenizer."""

    def encode(self, text: str, **_) -> list[int]:
        return [grpo_task.CHARACTERS.index(c) for c in text]

    def decode(self, ids, **_) -> str:
        return "".join(grpo_task.CHARACTERS[i] for i in ids)

    def bos_id(self):
        return None

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


def model(folder: str, mesh) -> qwen3.Qwen3:
    c = json.loads(Path(folder, "config.json").read_text())
    theta = c["rope_theta"] if "rope_theta" in c else c["rope_parameters"]["rope_theta"]
    config = qwen3.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=int(theta),
        norm_eps=c["rms_norm_eps"],
    )
    return qwen3_params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def algorithm() -> grpo_learner.GRPOConfig:
    return grpo_learner.GRPOConfig(
        num_generations=shape["group"], beta=shape["kl"], epsilon=0.2, kl_loss_mode="low_var_kl"
    )


def numbers(mesh) -> dict:
    """Advantages, loss and norm of the gradient of the one trajectory that all are given.

    It is padded with token 0, which it has nowhere else: masks are made of the pad.
    """
    given = json.loads(Path(shape["trajectory"]).read_text())
    prompts = jnp.asarray(grpo_task.left_padded([row["prompt"] for row in given], 0))
    tokens = jnp.asarray(grpo_task.right_padded([row["tokens"] for row in given], 0))
    old = grpo_task.right_padded([row["logprobs"] for row in given], 0.0, "float32")
    rewards = np.asarray([row["reward"] for row in given], np.float32)
    advantages = algo_core.compute_advantages(rewards, shape["group"])
    reference = nnx.split(model(shape["start"], mesh))
    example = grpo_learner.TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != 0,
        completion_ids=tokens,
        completion_mask=tokens != 0,
        ref_per_token_logps=common.compute_per_token_logps(
            *reference, prompt_tokens=prompts, completion_tokens=tokens, pad_id=0, eos_id=EOS
        ),
        advantages=jnp.asarray(advantages),
        old_per_token_logps=jnp.asarray(old),
    )
    how = algorithm()
    how.temperature = 1.0

    def loss(policy):
        return algo_core.grpo_loss_fn(policy, example, how, 0, EOS)

    (value, _), grads = nnx.value_and_grad(loss, has_aux=True)(model(shape["policy"], mesh))
    return {
        "advantages": np.asarray(advantages).tolist(),
        "loss": float(value),
        "gradient": float(optax.global_norm(nnx.to_pure_dict(grads))),
    }


def cluster(mesh) -> rl_cluster.RLCluster:
    roles = rl_cluster.Role
    longest = shape["prompt"] + shape["new"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(shape["rate"], b2=0.95, weight_decay=0.0),
    )
    return rl_cluster.RLCluster(
        actor=model(shape["start"], mesh),
        reference=model(shape["start"], mesh),
        tokenizer=Characters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=10**6, max_steps=10**6
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=shape["new"],
                max_prompt_length=shape["prompt"],
                temperature=1.0,
                top_p=1.0,
                kv_cache_size=longest,
            ),
        ),
    )


def batches(trained: nnx.Module, about: dict):
    """Batches of questions, as many as are asked for; the first two are warm-up."""
    lines = Path(shape["problems"]).read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    number, asked, left = 0, None, 2
    while True:
        if not left:
            state = jax.block_until_ready(nnx.state(trained, nnx.Param))
            if asked is None:
                parameters = sum(a.size for a in jax.tree.leaves(state))
                tunix = importlib.metadata.version("google-tunix")
                version = f"tunix {tunix}, jax {jax.__version__}"
                asked = protocol.requests(parameters, version, PHASES, **about)
            left = next(asked, 0)
            if not left:
                return
        left -= 1
        chosen = [questions[(number + i) % len(questions)] for i in range(shape["prompts"])]
        number += shape["prompts"]
        yield {"prompts": np.asarray(chosen)}  # of a list it would repeat the characters


def rewarded(prompts, completions, **_) -> list[float]:
    return [grpo_task.reward(text) for text in completions]


def main() -> None:
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), auto, devices=jax.devices()[:1])
    about = {"numbers": numbers(mesh)}
    roles = cluster(mesh)
    roles.generate = PHASES.wrapped("rollout", roles.generate)
    learner = grpo_learner.GRPOLearner(roles, algorithm(), reward_fns=rewarded)
    learner.train(batches(roles.actor_trainer.model, about))


main()
