"""The networks of masked video distillation, by size; importing this package registers the classifiers with timm."""

from mvd.models.autoencoders import build_image_autoencoder, build_video_autoencoder
from mvd.models.classifier import build_classifier
from mvd.models.registry import RegisteredClassifier
from mvd.models.student import build_student
from mvd.models.teachers import build_image_teacher, build_video_teacher

__all__ = [
    "RegisteredClassifier",
    "build_classifier",
    "build_image_autoencoder",
    "build_image_teacher",
    "build_student",
    "build_video_autoencoder",
    "build_video_teacher",
]
