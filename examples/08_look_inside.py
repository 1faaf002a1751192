"""What lies between a call and its launch: problem, plan, config.cuh, compiled kernel. Needs no GPU.

Registers and spills are those of the compiler, which comes with cuflash's extras cuda13 and cuda12; without one
everything else is printed.
"""

from cuflash import jit, plan
from cuflash.device import named
from cuflash.dtypes import BF16
from cuflash.errors import CompileError
from cuflash.masks import Mask
from cuflash.problem import Problem

for direction in ("forward", "backward"):
    problem = Problem(
        direction,
        BF16,
        batch=2,
        heads_q=16,
        heads_kv=4,
        len_q=4096,
        len_kv=4096,
        dim_qk=128,
        dim_v=128,
        mask=Mask(right=0),
        softmax_scale=128**-0.5,
    )
    device = named("h100")

    # Which kernels would run, with which tiles, and why not the others.
    print(plan.explain(problem, device), end="\n\n")

    for step in plan.choose(problem, device).steps:
        # All that is generated of the kernel: what else is compiled is a file below kernels/, but for layout.cuh, which
        # asserts that NumPy and the compiler lay out the kernel's arguments alike.
        print(jit.render.config_header(step.kernel, step.config))

        try:
            cubin = jit.compile_kernel(step.kernel, step.config, step.params, device.arch)
        except CompileError as error:  # compiling needs no GPU, but CuPy and NVRTC
            print(f"{step.kernel} is not compiled. {error}\n")
            continue
        spilled = cubin.spill_stores + cubin.spill_loads
        print(f"{step.kernel}: {cubin.registers} registers a thread, {spilled} bytes spilled, kept in {cubin.path}\n")
