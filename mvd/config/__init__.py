"""Settings: recipes, rows, data sets, sizes, run settings. Must import neither torch nor other packages of mvd."""

from mvd.config.datasets import DATASETS, Dataset, Sampling
from mvd.config.errors import ConfigError
from mvd.config.optimization import Optimization
from mvd.config.recipes import (
    KINDS,
    RECIPES,
    Augmentation,
    Finetune,
    ImageTeacher,
    Kind,
    Mixing,
    Pretrain,
    Recipe,
    Test,
    TrainRecipe,
    VideoTeacher,
    dataset_of,
)
from mvd.config.rows import Row, Target
from mvd.config.run_settings import DatasetPaths, Faults, Precision, Reader, RunSettings
from mvd.config.sizes import SIZES, Size

__all__ = [
    "DATASETS",
    "KINDS",
    "RECIPES",
    "SIZES",
    "Augmentation",
    "ConfigError",
    "Dataset",
    "DatasetPaths",
    "Faults",
    "Finetune",
    "ImageTeacher",
    "Kind",
    "Mixing",
    "Optimization",
    "Precision",
    "Pretrain",
    "Reader",
    "Recipe",
    "Row",
    "RunSettings",
    "Sampling",
    "Size",
    "Target",
    "Test",
    "TrainRecipe",
    "VideoTeacher",
    "dataset_of",
]
