"""What "small", "base", "large" and "huge" mean: the geometry of every network (method.md's tables).

Free of torch, so that the launcher can plan with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A stack of pre-norm blocks: width in channels, depth in blocks, number of attention heads."""

    width: int
    depth: int
    heads: int


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

    encoder: the ViT itself, in every role.
    clip: what the student, the classifier and the video teacher see.
    image: what the image teacher sees while it teaches; its grid equals the clip's.
    image_training: what the image teacher sees while it is trained itself.
    decoder: either branch of a distilled student of this size.
    image_decoder, video_decoder: the decoders with which teachers of this size are trained (MAE, VideoMAE).
    """

    encoder: Transformer
    decoder: Transformer
    video_decoder: Transformer
    image_decoder: Transformer = Transformer(width=512, depth=8, heads=16)
    clip: ClipShape = ClipShape()
    image: ImageShape = ImageShape()
    image_training: ImageShape = ImageShape()


SIZES: dict[str, Size] = {
    "small": Size(
        encoder=Transformer(width=384, depth=12, heads=6),
        decoder=Transformer(width=384, depth=2, heads=6),
        video_decoder=Transformer(width=192, depth=4, heads=3),
    ),
    "base": Size(
        encoder=Transformer(width=768, depth=12, heads=12),
        decoder=Transformer(width=768, depth=2, heads=12),
        video_decoder=Transformer(width=384, depth=4, heads=6),
    ),
    "large": Size(
        encoder=Transformer(width=1024, depth=24, heads=16),
        decoder=Transformer(width=512, depth=4, heads=8),
        video_decoder=Transformer(width=512, depth=12, heads=8),
    ),
    "huge": Size(
        encoder=Transformer(width=1280, depth=32, heads=16),
        decoder=Transformer(width=640, depth=8, heads=8),
        video_decoder=Transformer(width=640, depth=12, heads=8),
        image=ImageShape(image_size=196, patch_size=14),
        image_training=ImageShape(image_size=224, patch_size=14),
    ),
    # The demo's and the tests' size: learns motion on two CPU cores in minutes.
    "tiny": Size(
        encoder=Transformer(width=96, depth=4, heads=3),
        decoder=Transformer(width=96, depth=1, heads=3),
        video_decoder=Transformer(width=96, depth=1, heads=3),
        image_decoder=Transformer(width=96, depth=1, heads=3),
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
