"""TRL's GRPOTrainer, held at the beginning of a step until grpo.py asks for more."""

from __future__ import annotations

import tempfile

import protocol

shape = protocol.arguments()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import grpo_task  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

PHASES = protocol.Phases()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A character a token, as the file of the exported model has it, and an end it cannot write."""
    made = tokenizers.Tokenizer.from_file(f"{shape['start']}/tokenizer.json")
    first = grpo_task.CHARACTERS[0]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=grpo_task.END, pad_token=first, padding_side="left"
    )


def settings(folder: str) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=shape["prompts"] * shape["group"],
        num_generations=shape["group"],
        max_completion_length=shape["new"],
        temperature=1.0,
        beta=shape["kl"],
        use_bias_correction_kl=False,  # DeepSeek-V3.2's KL, times the ratio, is another objective
        epsilon=0.2,
        loss_type="grpo",
        learning_rate=shape["rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10**6,
        model_init_kwargs={"dtype": "float32"},
    )


class Turns(transformers.TrainerCallback):
    """Holds the trainer until more steps are asked for; the first two are warm-up."""

    def __init__(self, about: dict):
        self.about, self.left, self.asked = about, 2, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.left:
            self.asked = self.asked or self._requests(model)
            self.left = next(self.asked, 0)
            if not self.left:
                raise SystemExit(0)
        self.left -= 1

    def _requests(self, model):
        parameters = sum(p.numel() for p in model.parameters())
        version = f"trl {trl.__version__}, torch {torch.__version__}"
        return protocol.requests(parameters, version, PHASES, **self.about)


def numbers(trainer: trl.GRPOTrainer) -> dict:
    """Advantages, loss and norm of the gradient of the one trajectory that all are given, by the
    trainer's own methods: what it does after generation, and its loss."""
    given = json.loads(Path(shape["trajectory"]).read_text())
    rewards, start = [row["reward"] for row in given], trainer.model.state_dict()
    start = {name: a.clone() for name, a in start.items()}
    generate, score = trainer._generate, trainer._calculate_rewards
    tokens = [list(row["tokens"]) for row in given]
    prompts = [list(row["prompt"]) for row in given]
    trainer._generate = lambda asked: (prompts, tokens, None, [""] * len(given), None, {}, None, [])
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards)[:, None]
    inputs = trainer._generate_and_score_completions([{"prompt": ""} for _ in given])
    trainer._generate, trainer._calculate_rewards = generate, score
    old = grpo_task.right_padded([row["logprobs"] for row in given], 0.0, "float32")
    inputs["old_per_token_logps"] = torch.from_numpy(old)
    policy = transformers.AutoModelForCausalLM.from_pretrained(shape["policy"], dtype=torch.float32)
    trainer.model.load_state_dict(policy.state_dict())
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    trainer.model.load_state_dict(start)
    trainer.model.zero_grad(set_to_none=True)
    return {
        "advantages": inputs["advantages"].tolist(),
        "loss": loss.item(),
        "gradient": norm.item(),
    }


def rewarded(completions, **_) -> list[float]:
    return [grpo_task.reward(text) for text in completions]


def main() -> None:
    torch.set_num_threads(shape["threads"])
    lines = Path(shape["problems"]).read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=shape["start"],
            reward_funcs=rewarded,
            args=settings(folder),
            train_dataset=Dataset.from_list([{"prompt": q} for q in questions * 100]),
            processing_class=tokenizer(),
        )
        trainer.model.train()
        turns = Turns({"numbers": numbers(trainer)})
        trainer.add_callback(turns)
        trainer._generate = PHASES.wrapped("rollout", trainer._generate)
        trainer.train()


main()
