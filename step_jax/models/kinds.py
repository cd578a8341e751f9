"""Every kind of model that a loop can train and an artifact can hold."""

from __future__ import annotations

from step_jax.models.text.decoder import Decoder
from step_jax.models.text.reward import RewardModel
from step_jax.models.video.discriminator import Discriminator
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.vae import VideoVAE

Model = Decoder | RewardModel | VideoDiT | VideoVAE | Discriminator
