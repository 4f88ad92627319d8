from mambascope.ops.maps.lines import line
from mambascope.ops.maps.tiled import kernel_map
