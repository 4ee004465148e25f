"""The baseline of `step.py`: a straightforward implementation of the same networks and losses.

PyTorch only, in fp32: convolutions for the embeddings, explicit softmax attention, all tokens embedded before the
masked ones are dropped, default AdamW. Parameter names are those of mvd.models, so that weights can be copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd.config.sizes import ClipShape, Size, Transformer
from mvd.models.positions import sincos_2d, sincos_3d, sinusoid_1d


class Attention(nn.Module):
    """Multi-head self-attention with biases for query and value, and, with `key_bias`, for the key."""

    def __init__(self, width: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def blocks(shape: Transformer, key_bias: bool = False) -> nn.Sequential:
    return nn.Sequential(*[Block(shape.width, shape.heads, key_bias) for _ in range(shape.depth)])


class VideoEncoder(nn.Module):
    """Encoder of student, video teacher and classifier."""

    def __init__(self, shape: Transformer, clip: ClipShape, positions: Tensor) -> None:
        super().__init__()
        kernel = (clip.tubelet, clip.patch_size, clip.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, shape.width, kernel, kernel)})
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = blocks(shape)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def embed(self, video: Tensor) -> Tensor:
        return self.patch_embed["proj"](video).flatten(2).transpose(1, 2) + self.pos_embed


class Classifier(VideoEncoder):
    def __init__(self, own: Size, num_classes: int) -> None:
        width = own.encoder.width
        super().__init__(own.encoder, own.clip, sincos_3d(width, own.clip.slices, own.clip.side))
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.blocks(self.embed(video)).mean(dim=1)))


class VideoTeacher(nn.Module):
    def __init__(self, own: Size) -> None:
        super().__init__()
        self.encoder = VideoEncoder(own.encoder, own.clip, sinusoid_1d(own.encoder.width, own.clip.tokens))

    def forward(self, video: Tensor) -> Tensor:
        return self.encoder.blocks(self.encoder.embed(video))


class ImageTeacher(nn.Module):
    def __init__(self, own: Size) -> None:
        super().__init__()
        width, patch = own.encoder.width, own.image.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_2d(width, own.image.side, class_token=True))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = blocks(own.encoder, key_bias=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, frames: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](frames).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        return self.blocks(tokens)[:, 1:]


class Decoder(nn.Module):
    def __init__(self, shape: Transformer, outputs: int) -> None:
        super().__init__()
        self.blocks = blocks(shape)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, outputs)

    def forward(self, visible: Tensor, mask_token: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        batch, _, width = visible.shape
        positions = positions.expand(batch, -1, -1)
        visible = visible + positions[~mask].reshape(batch, -1, width)
        masked = mask_token + positions[mask].reshape(batch, -1, width)
        tokens = self.blocks(torch.cat([visible, masked], dim=1))
        return self.head(self.norm(tokens[:, visible.shape[1] :]))


class Student(VideoEncoder):
    def __init__(self, own: Size, teacher: Size) -> None:
        clip, width, inner = own.clip, own.encoder.width, own.decoder.width
        super().__init__(own.encoder, clip, sincos_3d(width, clip.slices, clip.side))
        for branch in ("img", "vid"):
            table = sincos_3d(inner, clip.slices, clip.side)
            self.register_parameter(f"mask_token_{branch}", nn.Parameter(torch.zeros(1, 1, inner)))
            self.register_parameter(f"pos_embed_{branch}", nn.Parameter(table, requires_grad=False))
            self.add_module(f"down_{branch}", nn.Linear(width, inner))
            self.add_module(f"decoder_{branch}", Decoder(own.decoder, teacher.encoder.width))

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(video)
        visible = tokens[~mask].reshape(len(video), -1, tokens.shape[-1])
        visible = self.norm(self.blocks(visible))
        image = self.decoder_img(self.down_img(visible), self.mask_token_img, self.pos_embed_img, mask)
        clip = self.decoder_vid(self.down_vid(visible), self.mask_token_vid, self.pos_embed_vid, mask)
        return image, clip


def distillation_loss(
    student: nn.Module, image_teacher: nn.Module, video_teacher: nn.Module, video: Tensor, mask: Tensor
) -> Tensor:
    """The loss of mvd.train.objectives if both teachers take the same image size."""
    with torch.no_grad():
        frames = video[:, :, ::2].transpose(1, 2)
        features = image_teacher(frames.flatten(0, 1))
        image_target = features.reshape(len(video), -1, features.shape[-1])[mask]
        video_target = video_teacher(video)[mask]
    image, clip = student(video, mask)
    return F.smooth_l1_loss(image.flatten(0, 1), image_target) + F.smooth_l1_loss(clip.flatten(0, 1), video_target)


def finetuning_loss(classifier: nn.Module, video: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets (B, classes)."""
    return -(targets * F.log_softmax(classifier(video), dim=1)).sum(dim=1).mean()
