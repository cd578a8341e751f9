"""Text in, batches out: sources, tokenizer, packing, mixtures, held-out split.

Importing this package loads no heavy library; each is imported where it is used.
"""

from step_jax.data.cache import Prepared, prepare, train_tokenizer
from step_jax.data.config import (
    ConversationConfig,
    DataConfig,
    PreferenceConfig,
    Source,
    Stage,
)
from step_jax.data.corpus import TokenCache
from step_jax.data.dataset import BatchIterator, TextDataset
from step_jax.data.heldout import Heldout
from step_jax.data.packing import Batch
from step_jax.tokenizers.base import Tokenizer

__all__ = [
    "Batch",
    "BatchIterator",
    "ConversationConfig",
    "DataConfig",
    "Heldout",
    "PreferenceConfig",
    "Prepared",
    "Source",
    "Stage",
    "TextDataset",
    "TokenCache",
    "Tokenizer",
    "prepare",
    "train_tokenizer",
]
