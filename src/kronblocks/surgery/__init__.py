"""Model surgery: select layers, replace them by block layers, and change these during a training."""

from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.lift import lift_
from kronblocks.surgery.records import apply_structure_, structure
from kronblocks.surgery.report import SurgeryReport
from kronblocks.surgery.rewind import rewind_
from kronblocks.surgery.selection import select
from kronblocks.surgery.sparsify import densify_, sparsify_

__all__ = [
    "SurgeryReport",
    "apply_structure_",
    "densify_",
    "lift_",
    "parameter_groups",
    "rewind_",
    "select",
    "sparsify_",
    "structure",
]
