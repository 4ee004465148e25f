"""Features of clips from an encoder without masking."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mvd.config.sizes import Size
from mvd.models.autoencoders import VideoAutoencoder
from mvd.models.classifier import Classifier
from mvd.models.encoder import VideoEncoder, fixed


def encoder_features(encoder: VideoEncoder, clips: Tensor) -> Tensor:
    """Mean over all tokens after the final norm: normalised clips (B, 3, T, S, S) -> (B, width)."""
    return mean_token(encoder, encoder.features(clips))


def mean_token(encoder: VideoEncoder, tokens: Tensor) -> Tensor:
    """The mean of the last block's tokens (B, N, width) after the final norm: (B, width).

    A classifier has its norm after the mean, as in its own forward pass.
    """
    if isinstance(encoder, Classifier):
        normed: Tensor = encoder.fc_norm(tokens.mean(dim=1))
        return normed
    return cast(Tensor, encoder.norm(tokens)).mean(dim=1)


def slice_means(encoder: VideoEncoder, tokens: Tensor) -> Tensor:
    """As mean_token, but a mean for each time slice (tubelet): (B, slices, width)."""
    means: Tensor = encoder.norm(tokens).unflatten(1, (encoder.patch_embed.clip.slices, -1)).mean(dim=2)
    if isinstance(encoder, Classifier):
        means = encoder.fc_norm(means)
    return means


def copy_encoder(network: nn.Module, size: Size, device: torch.device) -> VideoEncoder:
    """A frozen copy of the encoder of a student or video autoencoder, in evaluation mode, with fp32 weights.

    network: the module or DeepSpeed's engine. All processes call it together, because ZeRO-3 gathers each weight. The
    forward passes of a copy change neither the network's mode nor ZeRO-3's record of the order of its modules.
    """
    import deepspeed  # slow to import, and the rest of this module does without

    module: Any = getattr(network, "module", network)
    source: nn.Module = module.encoder if isinstance(module, VideoAutoencoder) else module
    with torch.device("meta"):  # draws no random numbers
        copy = VideoEncoder(size.encoder, size.clip, fixed(torch.empty(1, size.clip.tokens, size.encoder.width)))
    copy.to_empty(device=device)
    sources = dict([*source.named_parameters(), *source.named_buffers()])
    for name, target in [*copy.named_parameters(), *copy.named_buffers()]:
        weight = sources[name]
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
            target.copy_(weight)
    return copy.requires_grad_(False).eval()
