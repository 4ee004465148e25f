"""Validation during fine-tuning, and the multi-view test that gives a row's accuracy. Must not import mvd.train."""

from mvd.evaluation.merging import Merged, merge_views
from mvd.evaluation.trained import load_trained, read_protocol
from mvd.evaluation.views_of_file import test_views

__all__ = ["Merged", "load_trained", "merge_views", "read_protocol", "test_views"]
