"""What a transformer is made of: sites, units, families."""

from hfcompress.anatomy.families import FAMILIES, family_of, find_layers, find_sites
from hfcompress.anatomy.native import uniform_config
from hfcompress.anatomy.sites import (
    Change,
    Family,
    Site,
    StructureError,
    Writer,
    apply_record,
    check_record,
    keep_units,
)

__all__ = [
    "FAMILIES",
    "Change",
    "Family",
    "Site",
    "StructureError",
    "Writer",
    "apply_record",
    "check_record",
    "family_of",
    "find_layers",
    "find_sites",
    "keep_units",
    "uniform_config",
]
