"""The two frozen teachers. Their features are the last block's tokens WITHOUT the final norm (QUIRKS 26)."""

from torch import Tensor, nn

from mvd.config.sizes import Size, size
from mvd.models.encoder import ImageEncoder, VideoEncoder
from mvd.models.positions import sinusoid_1d


class ImageTeacher(ImageEncoder):
    """An MAE encoder at the resolution at which it teaches."""

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, S, S), normalised -> patch features (B, positions, width)."""
        return self.features(frames)[:, 1:]


class VideoTeacher(nn.Module):
    """A VideoMAE encoder over all frames; official files hold it under `encoder.`."""

    def __init__(self, own: Size) -> None:
        super().__init__()
        self.encoder = video_teacher_encoder(own)

    def forward(self, video: Tensor) -> Tensor:
        """Clips (B, 3, T, S, S), normalised -> token features (B, N, width)."""
        return self.encoder.features(video)


def video_teacher_encoder(own: Size, *, activation_checkpointing: bool = False) -> VideoEncoder:
    """VideoMAE's encoder: one sinusoid over all flattened tokens, unlike the student's table (QUIRKS 28)."""
    positions = nn.Buffer(sinusoid_1d(own.encoder.width, own.clip.tokens), persistent=False)
    return VideoEncoder(own.encoder, own.clip, positions, activation_checkpointing=activation_checkpointing)


def build_image_teacher(name: str) -> ImageTeacher:
    """A frozen image teacher of a named size (mvd.config.sizes), still to be loaded."""
    own = size(name)
    return ImageTeacher(own.encoder, own.image).requires_grad_(False).eval()


def build_video_teacher(name: str) -> VideoTeacher:
    """A frozen video teacher of a named size (mvd.config.sizes), still to be loaded."""
    return VideoTeacher(size(name)).requires_grad_(False).eval()
