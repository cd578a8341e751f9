"""step_jax: train the Step family of models with JAX.

The names below are the public surface. Each is imported from its module on first use, so that
``import step_jax`` and ``step-jax --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> its module, or ``module:name there``
_EXPORTS = {
    # Loops, and their configurations
    "pretrain": "step_jax.trainers.pretrain:run",
    "PretrainConfig": "step_jax.trainers.pretrain:Config",
    "sft": "step_jax.trainers.sft:run",
    "SFTConfig": "step_jax.trainers.sft:Config",
    # Comparisons of runs
    "run_ablation": "step_jax.trainers.ablation",
    "collect_ablation": "step_jax.trainers.ablation:collect",
    "run_sweep": "step_jax.trainers.sweep",
    "collect_sweep": "step_jax.trainers.sweep",
    "Values": "step_jax.trainers.variants",
    # Configuration
    "load_config": "step_jax.core.command_line",
    "load_file": "step_jax.core.config",
    "parse_config": "step_jax.core.config",
    "to_yaml": "step_jax.core.config",
    # Models
    "Decoder": "step_jax.models.text.decoder",
    "Group": "step_jax.models.text.decoder",
    "Block": "step_jax.models.text.decoder",
    "MHA": "step_jax.models.layers.attention.mha",
    "MLA": "step_jax.models.layers.attention.mla",
    "MFA": "step_jax.models.layers.attention.mfa",
    "equal_parameter_heads": "step_jax.models.layers.attention",
    # Devices
    "MeshConfig": "step_jax.core.sharding",
    "Sharding": "step_jax.core.sharding",
    "make_mesh": "step_jax.core.sharding",
    # Data
    "DataConfig": "step_jax.data.config",
    "TextDataset": "step_jax.data.dataset",
    "Tokenizer": "step_jax.tokenizers.base",
    "load_tokenizer": "step_jax.tokenizers.files",
    # Training
    "LossOutput": "step_jax.training.step",
    "Part": "step_jax.training.step",
    "TrainState": "step_jax.training.state",
    "Learning": "step_jax.training.learner",
    "Program": "step_jax.training.program",
    "Work": "step_jax.training.program",
    "Session": "step_jax.runs.session",
    "RunConfig": "step_jax.runs.session",
    "make_train_step": "step_jax.training.step",
    "make_optimizer": "step_jax.training.optimizers.build",
    "Checkpointer": "step_jax.checkpoint",
    "RunDirectory": "step_jax.runs.run_directory",
    "Reporter": "step_jax.runs.reporter",
    "LoggingConfig": "step_jax.runs.reporter",
    "read_metrics": "step_jax.runs.metrics_log",
    "plot_run": "step_jax.runs.plots",
    "plot_comparison": "step_jax.runs.plots",
    # Trained models
    "load_artifact": "step_jax.interop.artifacts",
    "generate": "step_jax.inference.generate",
    "SamplingConfig": "step_jax.inference.sampling",
    "attention_weights": "step_jax.evaluation.attention_probe",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'step_jax' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
