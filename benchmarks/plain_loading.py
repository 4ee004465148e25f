"""A straightforward loading pipeline with decord, Pillow and torchvision: the baseline of loading.py.

Each function reads one sample and returns the float32 inputs of a training or test step; PyTorch's `default_collate`
makes batches of them. Operations and their order
are the recipe's; random draws come from `random` and numpy's global state. From mvd only the frame indices and the
crop positions are imported.
"""

import random
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.nn.functional import interpolate
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import normalize, to_tensor

from mvd.config.sizes import ClipShape
from mvd.data.clip.crops import multi_scale_box
from mvd.data.clip.frame_sampling import (
    dense_test_indices,
    dense_train_indices,
    pretrain_indices,
    segment_test_indices,
    segment_train_indices,
)
from mvd.data.clip.masking import tube_mask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224


def open_with_decord(path: str) -> Any:
    import decord  # only now: once its libvpx is loaded, PyAV cannot write the VP9 videos of the benchmark

    return decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0))


def pretrain(path: str, seed: int) -> dict[str, torch.Tensor]:
    """Student's and teachers' clip, (3, 16, 224, 224) each, and the tube mask."""
    rng = np.random.default_rng(seed)
    reader = open_with_decord(path)
    frames = reader.get_batch(pretrain_indices(len(reader), rng)).asnumpy()
    images = [Image.fromarray(frame) for frame in frames]
    width, height = images[0].size
    box = multi_scale_box(height, width, SIZE, rng)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    cropped = [image.crop(corners) for image in images]
    clips = []
    for _ in ("student", "teacher"):  # one crop, resized for each
        resized = [image.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in cropped]
        clip = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).contiguous()
        clips.append(normalize(clip.float().div(255), MEAN, STD).transpose(0, 1))
    mask = torch.from_numpy(tube_mask(rng, ClipShape(), 0.9))
    return {"video": clips[0], "image_video": clips[1], "mask": mask}


def finetune(path: str, seed: int, sampling: str, flip: float) -> dict[str, torch.Tensor]:
    """Two augmented copies of a clip: (2, 3, 16, 224, 224)."""
    rng = np.random.default_rng(seed)
    reader = open_with_decord(path)
    sample = dense_train_indices if sampling == "dense" else segment_train_indices
    frames = reader.get_batch(sample(len(reader), rng)).asnumpy()
    return {"video": torch.stack([_augment(frames, 2 * seed + copy, flip) for copy in range(2)])}


RAND_AUGMENT = rand_augment_transform(
    "rand-m7-n4-mstd0.5-inc1", {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
)
ERASE = RandomErasing(0.25, mode="pixel", max_count=1, num_splits=1, device="cpu")


def _augment(frames: np.ndarray, seed: int, flip: float) -> torch.Tensor:
    images = []
    for frame in frames:  # the same draws for every frame
        random.seed(seed)
        np.random.seed(seed % 2**32)
        images.append(RAND_AUGMENT(Image.fromarray(frame)))
    clip = normalize(torch.stack([to_tensor(image) for image in images]), MEAN, STD)
    torch.manual_seed(seed)
    top, left, height, width = RandomResizedCrop.get_params(clip, (0.08, 1.0), (0.75, 1.3333))
    crop = clip[:, :, top : top + height, left : left + width]
    clip = interpolate(crop, (SIZE, SIZE), mode="bilinear", align_corners=False)
    if random.random() < flip:
        clip = clip.flip(-1)
    return ERASE(clip).transpose(0, 1)


def test_views(path: str, sampling: str, clips: int) -> torch.Tensor:
    """All views of a video, each made on its own: (clips x 3, 3, 16, 224, 224)."""
    return torch.stack([_view(path, sampling, clips, clip, crop) for clip in range(clips) for crop in range(3)])


def _view(path: str, sampling: str, clips: int, clip: int, crop: int) -> torch.Tensor:
    reader = open_with_decord(path)
    sample = dense_test_indices if sampling == "dense" else segment_test_indices
    numbers = sample(len(reader), clips)
    every = np.unique(numbers)  # a view reads the whole video's frames, then takes its own
    frames = [_short_side(frame) for frame in reader.get_batch(every).asnumpy()]
    chosen = np.stack([frames[place] for place in np.searchsorted(every, numbers[clip])])
    height, width = chosen.shape[1:3]
    start = int(crop * (max(height, width) - SIZE) / 2)
    square = chosen[:, start : start + SIZE] if height > width else chosen[:, :, start : start + SIZE]
    tensor = torch.stack([to_tensor(np.ascontiguousarray(frame)) for frame in square])
    return normalize(tensor, MEAN, STD).transpose(0, 1)


def _short_side(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    size = (SIZE, int(SIZE * height / width)) if width < height else (int(SIZE * width / height), SIZE)
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
