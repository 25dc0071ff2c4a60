"""What a run compiles on a CUDA GPU, compiled without one: every graph, every kernel to a binary. Minutes, so by hand:

    CUDA_CODE=9.0,8.6 uv run pytest tests/test_cuda_code.py -s      these chips, two minutes of a core each
    CUDA_CODE=all uv run pytest tests/test_cuda_code.py -s          all of them

Tensors are fake: they have a shape and the device "cuda", but no data. So PyTorch's compiler writes the code of a whole
run (warm-up, a second model, evaluation), Triton and its ptxas make binaries of it, and nothing is executed. What it
can't show: libraries (matrix products, FlashAttention-3), numbers, time. It needs Linux, a CUDA build of PyTorch and a
C++ compiler. It patches private parts of PyTorch: an AttributeError names what a release has renamed.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import run_python

import train

CHIPS = {  # compute capability: (a chip, its shared memory per block in bytes, its multiprocessors)
    "8.0": ("A100", 166_912, 108),
    "8.6": ("RTX 3090", 101_376, 82),
    "8.9": ("RTX 4090", 101_376, 128),
    "9.0": ("H100", 232_448, 132),
    "10.0": ("B200", 232_448, 148),
    "12.0": ("RTX 5090", 101_376, 170),
}
SCALES = {"FULL": (2048, 8192), "DESKTOP": (1024, 8192)}  # config in train.py: (tokens a row, vocabulary)

# PyTorch asks CUDA for the current device and its stream, even to differentiate tensors that have no data. This answers
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device getDevice() const override { return {kCUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
static impl::DeviceGuardImplRegistrar guard(kCUDA, new Guard);
static auto hooks = memcpy((void*)&at::detail::getCUDAHooks(), new Hooks, sizeof(void*));
"""


def pretend(chip):
    """This process has a GPU of that compute capability, as far as PyTorch's and Triton's compilers ask for it."""
    base = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{base}/include", f"-L{base}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["c++", source, "-o", library, *options], check=True)
        ctypes.CDLL(str(library))
    major, minor = map(int, chip.split("."))
    name, shared, multiprocessors = CHIPS[chip]
    properties = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=multiprocessors)
    properties.shared_memory_per_block_optin = shared
    properties.max_threads_per_multi_processor = 1536 if minor or major == 12 else 2048
    properties.regs_per_multiprocessor, properties.warp_size = 65_536, 32
    answers = dict(is_available=True, device_count=1, current_device=0, _exchange_device=0, _maybe_exchange_device=0)
    answers |= dict(get_device_capability=(major, minor), get_device_properties=properties, _lazy_init=None)
    answers |= dict(get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None)
    for attribute, answer in answers.items():
        patch(torch.cuda, attribute, lambda *_, answer=answer, **__: answer)
    torch._dynamo.utils.common_constant_types.add(SimpleNamespace)  # as the class of the real properties is
    from torch._subclasses import fake_tensor
    from triton.backends import backends, compiler
    from triton.runtime import driver

    class Driver(backends["nvidia"].driver):
        def __init__(self):
            pass

        def get_current_target(self):
            return compiler.GPUTarget("cuda", 10 * major + minor, 32)

    driver.set_active(Driver())
    patch(fake_tensor.FakeTensorMode, "avoid_device_init", True)
    patch(fake_tensor, "init_gpu_context", lambda device: None)
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):  # of newer PyTorch: it would replace GUARD
        patch(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)


def patch(owner, name, value):
    """Replace a private name of PyTorch, for the rest of this process."""
    mock.patch.object(owner, name, value).start()


def code_writer(sources, fake_mode):
    """TorchInductor as a backend of torch.compile that executes nothing: Triton's kernels go to {source: name}."""
    from torch._inductor import async_compile, compile_fx, config

    config.force_disable_caches = True
    config.shape_padding = False  # whether it pays is measured on the GPU
    config.joint_graph_constant_folding = False  # constants are computed on the GPU

    def keep_source(name, source, device_str=None):
        sources[source.strip()] = name

    def compile_graph(gm, inputs, **options):
        outputs = [node.meta["val"] if node else None for node in gm.graph.output_node().args[0]]
        compile_fx.compile_fx_inner(gm, inputs, **options)

        def empty(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)

        def call(arguments):
            arguments.clear()
            return [t if t is None else empty(t) for t in outputs]

        call._boxed_call = True
        return call

    def backend(gm, inputs):
        torch._guards.TracingContext.get().fake_mode = fake_mode  # Dynamo has made one of its own
        return compile_fx.compile_fx(gm, inputs, inner_compile=compile_graph)

    patch(async_compile.AsyncCompile, "triton", staticmethod(keep_source))
    return backend


def binaries(sources):
    """Compile each kernel with Triton and ptxas. Returns (shared memory in bytes, kernel), one per configuration."""
    import triton
    from torch._inductor.codecache import PyCodeCache

    made, compile_one = [], triton.compile
    patch(triton, "compile", lambda *arguments, **options: made.append(compile_one(*arguments, **options)) or made[-1])
    wanted = 0
    for source, name in sources.items():
        kernel = getattr(PyCodeCache.load(source), name)
        wanted += len(kernel.configs)
        kernel.precompile(warm_cache_only=True)
    assert len(made) == wanted and all(binary.asm["cubin"] for binary in made)
    return sorted(((binary.metadata.shared, binary.metadata.name) for binary in made), reverse=True)


def main(chip, scale):
    pretend(chip)
    from torch._dynamo.utils import counters
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.nn.attention import flex_attention as flex

    make_mask = flex.create_block_mask

    def block_mask(*arguments, device):
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            mask = make_mask(*arguments, device="cpu")
        for name, value in vars(mask).items():
            if isinstance(value, torch.Tensor):
                setattr(mask, name, torch.empty_like(value, device=device))
        return mask

    def bfloat16(module):  # PyTorch 2.11 can't change a fake parameter in place
        module.weight = torch.nn.Parameter(module.weight.detach().bfloat16())

    patch(flex, "create_block_mask", block_mask)
    patch(torch.nn.Embedding, "bfloat16", bfloat16)
    patch(torch.Tensor, "item", lambda loss: 0.0)  # the loop waits for the GPU by it
    patch(train, "init_weights", lambda model, config: None)  # there are no values to set and check
    config, (T, V), device = getattr(train, scale), SCALES[scale], torch.device("cuda:0")
    sources = {}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as fake_mode:
        compiled = partial(train.compiler(), backend=code_writer(sources, fake_mode))
        attention = train.flex_attention_for(T, train.window_sizes(config, T), device)
        build = partial(train.Run, config, V, T, device, attention, compiled)
        assert train.warm_up(build, config, V, T, device) == config.DEVICE_BATCH_SIZE
        graphs = counters["stats"]["unique_graphs"]
        train.step_seconds(build, V, config.TOTAL_BATCH_SIZE // T, config.DEVICE_BATCH_SIZE, T, device)
    assert counters["stats"]["unique_graphs"] == graphs > 3, "the second model was compiled anew"
    assert not counters["graph_break"], list(counters["graph_break"])
    print(json.dumps(binaries(sources)))


CHOSEN = os.environ.get("CUDA_CODE", "").replace("all", ",".join(CHIPS))


@pytest.mark.skipif(not CHOSEN, reason="takes minutes: CUDA_CODE=9.0,8.6 in the environment runs it for these chips")
@pytest.mark.skipif(not (torch.version.cuda and shutil.which("c++")), reason="needs PyTorch for CUDA and c++")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("chip", CHOSEN.split(",") if CHOSEN else ["9.0", "8.6"])
def test_everything_that_a_run_compiles(chip, scale, tmp_path):
    done = run_python(__file__, chip, scale, timeout=900, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{CHIPS[chip][0]}: {len(found)} binaries")
    assert len(found) > 100 and found[0][0] > 40 * 2**10  # FlexAttention's are among them
    assert found[0][0] <= CHIPS[chip][1], found[:5]


if __name__ == "__main__":
    main(*sys.argv[1:])
