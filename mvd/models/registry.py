"""The classifiers as timm models: `timm.create_model("mvd_vit_base_patch16_224", num_classes=400, ...)`.

For use of a trained network outside this harness. `checkpoint_path=FILE` loads official files and those of
`python -m mvd.export`; there are no weights to download.
"""

from collections.abc import Callable, Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mvd.config.sizes import SIZES, Size, size
from mvd.models.checkpoints import find_weights
from mvd.models.classifier import Classifier, new_head
from mvd.weight_keys import find_sources, is_position_table, unwrap

__all__ = ["RegisteredClassifier"]


class RegisteredClassifier(Classifier):
    """A classifier with timm's model interface; its input is a clip, (B, 3, 16, 224, 224)."""

    def __init__(
        self,
        own: Size,
        *,
        num_classes: int = 400,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        if in_chans != 3 or global_pool != "avg":
            raise ValueError(
                f"in_chans must be 3 and global_pool 'avg', got in_chans={in_chans}, global_pool={global_pool!r}; "
                "leave both out"
            )
        super().__init__(
            own, max(num_classes, 1), drop_path=drop_path_rate, head_dropout=drop_rate, activation_checkpointing=False
        )
        self.num_features = self.embed_dim = self.head_hidden_size = own.encoder.width
        self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()

    def forward_features(self, video: Tensor) -> Tensor:
        """Clips (B, 3, T, S, S), normalised -> the last block's tokens (B, N, width)."""
        return self.features(video)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, width) -> logits (B, classes), or with `pre_logits` the head's input, (B, width)."""
        pooled: Tensor = self.head_dropout(self.fc_norm(tokens.mean(dim=1)))
        if pre_logits:
            return pooled
        logits: Tensor = self.head(pooled)
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes; 0 takes the head away, so that the model returns features."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' (the mean of all tokens), got {global_pool!r}; leave it out")
        self.num_classes = num_classes
        device = self.fc_norm.weight.device
        self.head = new_head(self.embed_dim, num_classes).to(device) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.activation_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns that map parameter names to layers, for layer-wise learning rates."""
        return {"stem": r"^pos_embed|^patch_embed", "blocks": r"^blocks\.(\d+)"}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but accepts official layouts too, since timm applies no filter to `checkpoint_path`."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict, assign)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights under the model's names, without position tables, which are fixed (QUIRKS 28).

    Keys that the model does not have are kept, so that a strict load reports them.
    """
    entries = unwrap(state_dict, Tensor, "the checkpoint").entries
    sources = find_sources(model.state_dict(), entries, "the checkpoint")
    used = {key for keys in sources.values() for key in keys}
    rest = {key: value for key, value in entries.items() if key not in used and not is_position_table(key)}
    return find_weights(sources, entries) | rest


def timm_name(size_name: str) -> str:
    """The name under which timm knows the classifier of a size (mvd.config.sizes)."""
    clip = size(size_name).clip
    return f"mvd_vit_{size_name}_patch{clip.patch_size}_{clip.image_size}"


def _create(size_name: str, pretrained: bool, **kwargs: Any) -> RegisteredClassifier:
    return build_model_with_cfg(
        RegisteredClassifier,
        timm_name(size_name),
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        own=size(size_name),
        **kwargs,
    )


def _settings(size_name: str) -> dict[str, Any]:
    image_size = size(size_name).clip.image_size
    return {
        "num_classes": 400,
        "input_size": (3, image_size, image_size),
        "fixed_input_size": False,  # the size is part of the model's name
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({timm_name(name): _settings(name) for name in SIZES})


def _entry_point(size_name: str) -> Callable[..., RegisteredClassifier]:
    """The function that timm.create_model calls for a size; timm registers it by its __name__."""

    def create(pretrained: bool = False, **kwargs: Any) -> RegisteredClassifier:
        return _create(size_name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = timm_name(size_name)
    clip = size(size_name).clip
    create.__doc__ = f"{size_name} over {clip.frames} frames of {clip.image_size} x {clip.image_size}."
    return create


for _name in SIZES:
    register_model(_entry_point(_name))
