"""All fourteen rows of the paper."""

from experiments import k400, ssv2

rows = k400.rows + ssv2.rows
