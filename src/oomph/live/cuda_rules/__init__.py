"""Where CUDA allocates otherwise than a step traced on fake CPU tensors: hidden allocations, workspaces, branches.

``CudaRules`` answers for one op call what the CUDA kernel allocates besides its outputs. ``CudaFunctions`` replaces the
composite functions that take another branch on CUDA, ``cuda_autocast`` the CPU's autocast. ``as_unwatched`` gives the operator
that torch runs in place where no dispatch mode watches. Each rule has a name in ``RULES``, by which
it is left out. docs/cuda-rules.md lists every rule with its source.
"""

from oomph.live.cuda_rules.autocast import cuda_autocast
from oomph.live.cuda_rules.composites import CudaFunctions
from oomph.live.cuda_rules.names import RULES
from oomph.live.cuda_rules.program import Device, Extra, Program
from oomph.live.cuda_rules.rules import CudaRules
from oomph.live.cuda_rules.unwatched import as_unwatched

__all__ = ["RULES", "CudaFunctions", "CudaRules", "Device", "Extra", "Program", "as_unwatched", "cuda_autocast"]
