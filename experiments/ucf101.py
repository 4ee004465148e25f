"""The student of vitb_from_vitb_k400, fine-tuned on each of UCF101's three splits.

No recipe of MVD is released for UCF101, so there is no target. The settings are those of VideoMAE's script for UCF101.
A row file of your own with `from experiments.ucf101 import rows` and `row = rows[0]` runs the first split only.
"""

from experiments import vitb_from_vitb_k400
from experiments.recipes import on_three_splits

rows = on_three_splits(vitb_from_vitb_k400.row, "ucf101", epochs=100, base_lr=5e-4)
