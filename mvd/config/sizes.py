"""The model sizes, one record each. A new size is one record here.

Must not import torch: that keeps the launcher's start-up fast.
"""

from dataclasses import dataclass, field

from mvd.config.errors import check
from mvd.config.fields import NOT_HASHED, since


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A stack of pre-norm blocks: width in channels, depth in blocks, attention heads, MLP width / width."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = field(default=4.0, metadata=since(4.0))

    def __post_init__(self) -> None:
        check(
            min(self.width, self.depth, self.heads) > 0 and self.width % self.heads == 0,
            "width, depth and heads of a transformer must be positive and width a multiple of heads, got "
            f"width={self.width}, depth={self.depth}, heads={self.heads}",
        )
        check(self.mlp_width > 0, f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """A video input and its tubelets; sizes in pixels and frames."""

    frames: int = 16
    image_size: int = 224
    patch_size: int = 16
    tubelet: int = 2

    @property
    def slices(self) -> int:
        """Temporal positions of the token grid."""
        return self.frames // self.tubelet

    @property
    def side(self) -> int:
        """Tokens along a row or a column of the token grid."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Tokens of one temporal slice (196 for the rows)."""
        return self.side**2

    @property
    def tokens(self) -> int:
        """Tokens of a clip (1568 for the rows)."""
        return self.slices * self.positions


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """An image input and its patches, in pixels."""

    image_size: int = 224
    patch_size: int = 16

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        return self.side**2


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model size in all its roles.

    short_name: the size in the names of rows and teachers.
    encoder: the ViT, in every role.
    clip: input of student, classifier and video teacher.
    image: input of the image teacher in distillation; its token grid must equal the clip's.
    image_training: input of the image teacher in its own training.
    decoder: each of the two decoders of a student of this size.
    image_decoder, video_decoder: the decoders that train teachers of this size (MAE, VideoMAE).
    """

    short_name: str = field(metadata=NOT_HASHED)
    encoder: Transformer
    decoder: Transformer
    video_decoder: Transformer
    image_decoder: Transformer = Transformer(width=512, depth=8, heads=16)
    clip: ClipShape = ClipShape()
    image: ImageShape = ImageShape()
    image_training: ImageShape = ImageShape()

    def __post_init__(self) -> None:
        clip, images = self.clip, (self.image, self.image_training)
        check(
            clip.frames % clip.tubelet == 0 and all(s.image_size % s.patch_size == 0 for s in (clip, *images)),
            f"size {self.short_name}: frames must be a multiple of the tubelet and image sizes of their patch sizes, "
            f"got {clip}, {self.image}, {self.image_training}",
        )
        check(
            clip.positions == self.image.positions,
            f"size {self.short_name}: the image teacher's grid must equal the clip's, got {self.image.side} x "
            f"{self.image.side} and {clip.side} x {clip.side} tokens",
        )


SIZES: dict[str, Size] = {
    "small": Size(
        short_name="vits",
        encoder=Transformer(width=384, depth=12, heads=6),
        decoder=Transformer(width=384, depth=2, heads=6),
        video_decoder=Transformer(width=192, depth=4, heads=3),
    ),
    "base": Size(
        short_name="vitb",
        encoder=Transformer(width=768, depth=12, heads=12),
        decoder=Transformer(width=768, depth=2, heads=12),
        video_decoder=Transformer(width=384, depth=4, heads=6),
    ),
    "large": Size(
        short_name="vitl",
        encoder=Transformer(width=1024, depth=24, heads=16),
        decoder=Transformer(width=512, depth=4, heads=8),
        video_decoder=Transformer(width=512, depth=12, heads=8),
    ),
    "huge": Size(
        short_name="vith",
        encoder=Transformer(width=1280, depth=32, heads=16),
        decoder=Transformer(width=640, depth=8, heads=8),
        video_decoder=Transformer(width=640, depth=12, heads=8),
        image=ImageShape(image_size=196, patch_size=14),
        image_training=ImageShape(image_size=224, patch_size=14),
    ),
    # The demo's and the tests' size: learns motion on two CPU cores in minutes.
    "tiny": Size(
        short_name="tiny",
        encoder=Transformer(width=96, depth=4, heads=3),
        decoder=Transformer(width=96, depth=1, heads=3),
        video_decoder=Transformer(width=96, depth=1, heads=3),
        image_decoder=Transformer(width=96, depth=1, heads=3),
        clip=ClipShape(image_size=48, patch_size=12),
        image=ImageShape(image_size=48, patch_size=12),
        image_training=ImageShape(image_size=48, patch_size=12),
    ),
    # A smaller student for the teachers of the size above.
    "nano": Size(
        short_name="nano",
        encoder=Transformer(width=48, depth=4, heads=3),
        decoder=Transformer(width=48, depth=1, heads=3),
        video_decoder=Transformer(width=48, depth=1, heads=3),
        image_decoder=Transformer(width=48, depth=1, heads=3),
        clip=ClipShape(image_size=48, patch_size=12),
        image=ImageShape(image_size=48, patch_size=12),
        image_training=ImageShape(image_size=48, patch_size=12),
    ),
}


def size(name: str) -> Size:
    """The size of that name; ValueError with the known names otherwise."""
    if name not in SIZES:
        raise ValueError(f"unknown model size {name!r}; use one of {', '.join(SIZES)}")
    return SIZES[name]
