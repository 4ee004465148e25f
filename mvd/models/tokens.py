"""Tokens of images and clips, and the masks that hide some of them."""

import torch
from torch import Tensor


def cut_tubelets(video: Tensor, tubelet: int, patch_size: int) -> Tensor:
    """Cuts clips (B, C, T, H, W) into tokens in (t, h, w) order: (B, N, C, tubelet, patch_size, patch_size)."""
    batch, channels, frames, height, width = video.shape
    t, p = tubelet, patch_size
    blocks = video.reshape(batch, channels, frames // t, t, height // p, p, width // p, p)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens (B, K, ...) at indices (B, K) of tokens (B, N, ...)."""
    batch, count = tokens.shape[:2]
    # By rows: indices as wide as the tokens, which take_along_dim builds, would need more memory than the tokens.
    rows = indices + torch.arange(0, batch * count, count, device=indices.device)[:, None]
    taken: Tensor = tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, indices.shape)
    return taken


def visible_then_masked(mask: Tensor) -> Tensor:
    """Token indices (B, N), each row's visible ones first, both parts in token order; mask: (B, N), True = masked.

    No device-to-host sync.
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def count_masked(mask: Tensor) -> int:
    """The number of masked tokens per row of a mask (B, N). Waits for the device, unless the mask is on the CPU.

    Raises:
        ValueError: the rows differ in their number of masked tokens, or all or no tokens are masked.
    """
    counts: set[int] = set(mask.sum(dim=1).tolist())
    if len(counts) != 1 or not 0 < (count := counts.pop()) < mask.shape[1]:
        raise ValueError(
            "every clip of a batch must have the same number of masked tokens, and at least one masked and one "
            "visible token; draw all masks of a batch with one mask ratio"
        )
    return count
