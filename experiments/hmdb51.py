"""The student of vitb_from_vitb_k400, fine-tuned on each of HMDB51's three splits.

No recipe of MVD is released for HMDB51, so there is no target. The settings are those of experiments/ucf101.py with
half the epochs and twice the learning rate. A row file of your own with `from experiments.hmdb51 import rows` and
`row = rows[0]` runs the first split only.
"""

from experiments import vitb_from_vitb_k400
from experiments.recipes import on_three_splits

rows = on_three_splits(vitb_from_vitb_k400.row, "hmdb51", epochs=50, base_lr=1e-3)
