"""The student: a video ViT that encodes the visible tokens and predicts both teachers' features of the masked ones."""

from functools import partial

from torch import Tensor, nn

from mvd.config.sizes import Size, size
from mvd.models.decoder import Decoder, append_mask_tokens, mask_token
from mvd.models.encoder import VideoEncoder, fixed, init_transformer
from mvd.models.positions import sincos_3d
from mvd.models.tokens import count_masked, visible_then_masked


class Student(VideoEncoder):
    """An encoder with an image and a video decoder of the same shape (paper, section 3); official parameter names."""

    def __init__(self, own: Size, teacher: Size, *, drop_path: float, activation_checkpointing: bool) -> None:
        clip, width, inner = own.clip, own.encoder.width, own.decoder.width
        super().__init__(
            own.encoder,
            clip,
            fixed(sincos_3d(width, clip.slices, clip.side)),
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        branch = partial(
            Decoder,
            own.decoder,
            teacher.encoder.width,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        self.mask_token_img = mask_token(inner)
        self.pos_embed_img = fixed(sincos_3d(inner, clip.slices, clip.side))
        self.mask_token_vid = mask_token(inner)
        self.pos_embed_vid = fixed(sincos_3d(inner, clip.slices, clip.side))
        self.down_img = nn.Linear(width, inner)
        self.decoder_img = branch()
        self.down_vid = nn.Linear(width, inner)
        self.decoder_vid = branch()
        self.apply(init_transformer)

    def forward(self, video: Tensor, mask: Tensor, masked: int | None = None) -> tuple[Tensor, Tensor]:
        """Predicts the features of the masked tokens.

        video: (B, 3, T, S, S), normalised. mask: (B, N) bool, True = masked, the same count in every row. masked: that
        count, if it is known, which avoids waiting for the device.
        Returns (image features, video features), each (B, masked, teacher's width), in token order.

        Raises:
            ValueError: the clip has another shape than this network's, or the mask's rows differ in count.
        """
        masked = count_masked(mask) if masked is None else masked
        order = visible_then_masked(mask)
        tokens = self.norm(self.features(video, order[:, :-masked]))
        image = append_mask_tokens(self.down_img(tokens), self.mask_token_img, self.pos_embed_img, order)
        clip = append_mask_tokens(self.down_vid(tokens), self.mask_token_vid, self.pos_embed_vid, order)
        return self.decoder_img(image, masked), self.decoder_vid(clip, masked)


def build_student(
    name: str, *, teacher: str, drop_path: float = 0.0, activation_checkpointing: bool = False
) -> Student:
    """A student of this size (mvd.config.sizes) for teachers of another, randomly initialised."""
    return Student(size(name), size(teacher), drop_path=drop_path, activation_checkpointing=activation_checkpointing)
