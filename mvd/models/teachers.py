"""The two frozen teachers. Their features are the last block's tokens WITHOUT the final norm (QUIRKS 26)."""

from torch import Tensor, nn

from mvd.config.sizes import Size, size
from mvd.models.encoder import ImageEncoder, VideoEncoder
from mvd.models.positions import sinusoid_1d


class ImageTeacher(ImageEncoder):
    """An MAE encoder at the resolution used for distillation."""

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, S, S), normalised -> patch features (B, positions, width)."""
        return self.features(frames)[:, 1:]


class VideoTeacher(nn.Module):
    """A VideoMAE encoder over all tokens; official files have the prefix `encoder.`."""

    def __init__(self, own: Size) -> None:
        super().__init__()
        self.encoder = video_teacher_encoder(own)

    def forward(self, video: Tensor) -> Tensor:
        """Clips (B, 3, T, S, S), normalised -> token features (B, N, width)."""
        return self.encoder.features(video)


def video_teacher_encoder(own: Size, *, activation_checkpointing: bool = False) -> VideoEncoder:
    """VideoMAE's encoder: a 1-D sinusoidal table over flattened tokens, unlike the student's (QUIRKS 28)."""
    positions = nn.Buffer(sinusoid_1d(own.encoder.width, own.clip.tokens), persistent=False)
    return VideoEncoder(own.encoder, own.clip, positions, activation_checkpointing=activation_checkpointing)


def build_image_teacher(name: str) -> ImageTeacher:
    """A frozen, randomly initialised image teacher of this size (mvd.config.sizes); load its weights next."""
    own = size(name)
    return ImageTeacher(own.encoder, own.image).requires_grad_(False).eval()


def build_video_teacher(name: str) -> VideoTeacher:
    """A frozen, randomly initialised video teacher of this size (mvd.config.sizes); load its weights next."""
    return VideoTeacher(size(name)).requires_grad_(False).eval()
