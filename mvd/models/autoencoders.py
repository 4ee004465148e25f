"""The masked autoencoders that train the teachers; parameter names are those of MAE and VideoMAE."""

import torch
from torch import Tensor, nn

from mvd.config.sizes import Size, size
from mvd.models.decoder import Decoder, append_mask_tokens, mask_token
from mvd.models.encoder import Blocks, ImageBlock, ImageEncoder, fixed, init_transformer, layer_norm
from mvd.models.positions import sincos_2d, sinusoid_1d
from mvd.models.teachers import video_teacher_encoder
from mvd.models.tokens import count_masked, visible_then_masked


class ImageAutoencoder(ImageEncoder):
    """MAE (He et al., CVPR 2022): predicts the pixels of masked patches from the visible ones."""

    def __init__(self, own: Size) -> None:
        image, inner = own.image_training, own.image_decoder.width
        super().__init__(own.encoder, image)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed = fixed(sincos_2d(inner, image.side, class_token=True))
        self.decoder_embed = nn.Linear(own.encoder.width, inner)
        self.decoder_blocks = Blocks(own.image_decoder, ImageBlock)
        self.decoder_norm = layer_norm(inner)
        self.decoder_pred = nn.Linear(inner, 3 * image.patch_size**2)
        self.apply(init_transformer)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as MAE: initialised like a linear layer
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor, masked: int | None = None) -> Tensor:
        """Images (B, 3, S, S), mask (B, N) bool, True = masked -> pixels (B, masked, patch_size**2 * 3).

        A patch's values come row by row, channels last, in token order. masked: as for the student.
        """
        masked = count_masked(mask) if masked is None else masked
        order = visible_then_masked(mask)
        tokens = self.decoder_embed(self.norm(self.features(images, order[:, :-masked])))
        positions = self.decoder_pos_embed
        class_token = tokens[:, :1] + positions[:, :1]
        patches = append_mask_tokens(tokens[:, 1:], self.mask_token, positions[:, 1:], order)
        tokens = self.decoder_blocks(torch.cat([class_token, patches], dim=1))
        pixels: Tensor = self.decoder_pred(self.decoder_norm(tokens[:, -masked:]))
        return pixels


class VideoAutoencoder(nn.Module):
    """VideoMAE (Tong et al., NeurIPS 2022): predicts the pixels of masked tubelets from the visible ones."""

    def __init__(self, own: Size, *, activation_checkpointing: bool) -> None:
        super().__init__()
        clip, inner = own.clip, own.video_decoder.width
        self.encoder = video_teacher_encoder(own, activation_checkpointing=activation_checkpointing)
        self.encoder_to_decoder = nn.Linear(own.encoder.width, inner, bias=False)
        self.mask_token = mask_token(inner)
        self.pos_embed = nn.Buffer(sinusoid_1d(inner, clip.tokens), persistent=False)
        self.decoder = Decoder(
            own.video_decoder,
            3 * clip.tubelet * clip.patch_size**2,
            activation_checkpointing=activation_checkpointing,
        )
        self.apply(init_transformer)

    def forward(self, video: Tensor, mask: Tensor, masked: int | None = None) -> Tensor:
        """Clips (B, 3, T, S, S), mask (B, N) bool, True = masked -> pixels (B, masked, tubelet * patch_size**2 * 3).

        A tubelet's values come frame by frame, row by row, channels last, in token order. masked: as for the student.
        """
        masked = count_masked(mask) if masked is None else masked
        order = visible_then_masked(mask)
        tokens = self.encoder.norm(self.encoder.features(video, order[:, :-masked]))
        tokens = append_mask_tokens(self.encoder_to_decoder(tokens), self.mask_token, self.pos_embed, order)
        pixels: Tensor = self.decoder(tokens, masked)
        return pixels


def build_image_autoencoder(name: str) -> ImageAutoencoder:
    """The MAE of an image teacher of this size (mvd.config.sizes), randomly initialised."""
    return ImageAutoencoder(size(name))


def build_video_autoencoder(name: str, *, activation_checkpointing: bool = False) -> VideoAutoencoder:
    """The VideoMAE of a video teacher of this size (mvd.config.sizes), randomly initialised."""
    return VideoAutoencoder(size(name), activation_checkpointing=activation_checkpointing)
