"""Every kind of model that a loop can train and an artifact can hold."""

from __future__ import annotations

from step_jax.models.text.decoder import Decoder
from step_jax.models.video.discriminator import Discriminator
from step_jax.models.video.vae import VideoVAE
from step_jax.models.vision.image_transformer import ImageTransformer

Model = Decoder | ImageTransformer | VideoVAE | Discriminator
