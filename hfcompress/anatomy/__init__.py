"""What a transformer is made of: sites, units, families."""

from hfcompress.anatomy.depth import drop_layers
from hfcompress.anatomy.families import FAMILIES, REFUSED, REFUSED_IF, family_of, find_layers, find_sites, named_layers
from hfcompress.anatomy.hidden import find_stream, keep_hidden
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
from hfcompress.anatomy.stream import Stream, StreamDim, apply_hidden

__all__ = [
    "FAMILIES",
    "REFUSED",
    "REFUSED_IF",
    "Change",
    "Family",
    "Site",
    "Stream",
    "StreamDim",
    "StructureError",
    "Writer",
    "apply_hidden",
    "apply_record",
    "check_record",
    "drop_layers",
    "family_of",
    "find_layers",
    "find_sites",
    "find_stream",
    "keep_hidden",
    "keep_units",
    "named_layers",
    "uniform_config",
]
