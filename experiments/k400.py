"""The seven rows of the paper on Kinetics-400."""

from experiments import (
    vitb_from_vitb_k400,
    vitb_from_vitl_k400,
    vith_k400,
    vitl_e800_k400,
    vitl_k400,
    vits_from_vitb_k400,
    vits_from_vitl_k400,
)

rows = (
    vits_from_vitb_k400.row,
    vits_from_vitl_k400.row,
    vitb_from_vitb_k400.row,
    vitb_from_vitl_k400.row,
    vitl_k400.row,
    vitl_e800_k400.row,
    vith_k400.row,
)
