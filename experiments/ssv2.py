"""The seven rows of the paper on Something-Something V2."""

from experiments import (
    vitb_from_vitb_ssv2,
    vitb_from_vitl_ssv2,
    vith_ssv2,
    vitl_e800_ssv2,
    vitl_ssv2,
    vits_from_vitb_ssv2,
    vits_from_vitl_ssv2,
)

rows = (
    vits_from_vitb_ssv2.row,
    vits_from_vitl_ssv2.row,
    vitb_from_vitb_ssv2.row,
    vitb_from_vitl_ssv2.row,
    vitl_ssv2.row,
    vitl_e800_ssv2.row,
    vith_ssv2.row,
)
