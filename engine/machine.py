"""The machine a run computes on: device, precision, threads, torch.compile, one process or many, and
FLOPs."""

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from objectives import loss_sum
from support import kernels
from support.cli import BadInput
from support.kernels import cpu_info


@dataclass(frozen=True)
class Machine:
    """Where a run computes: the device, its precision, and which of how many processes this is."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    rank: int = 0
    world: int = 1
    fsdp: bool = False

    @property
    def first(self):
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def precision(self):
        """The dtype as --dtype has it."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def autocast(self):
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self):
        words = [self.device.type, self.precision, *["compiled"] * self.compiled]
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            words.append(f"on {threads} thread" + "s" * (threads > 1))
        return " ".join(words) + (f", {self.world} processes" if self.world > 1 else "")


# ---------------------------------------------------------------------------- FLOPs

def parameters(model):
    """Number of parameters (with the embedding, without it)."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.embedding.weight.numel()


def flops_per_sequence(config, path, length, targets, given=None):
    """Floating-point operations of the matrix products that one training step does for one sequence.

    `targets` rows go through the output layer, and on the mae path `given` rows (default: all others) through
    the encoder. Forward once, backward twice. Attention counts what the kernel needs: half of S^2 for the
    causal path and for two streams from LONG tokens, where blocks that nobody sees are skipped. Used for
    model FLOP utilisation.
    """
    S, n = length, targets

    def stack(D, rows, content, share=1.0):
        """Multiply-adds of layers that send `rows[l]` rows through attention to `content` rows and the
        feed-forward."""
        row = D * D + D * D + 3 * D * 2 * D                    # q, attention's output, feed-forward
        return sum(r * row + content * 2 * D * D + 2 * r * content * share * D for r in rows)

    D, L, width = config.width, config.layers, config.width
    if path == "mae":
        layers, width, _ = config.decoder
        v = S - n if given is None else given
        macs = stack(D, [v] * L, v) + v * D * width + stack(width, [S] * (layers - 1) + [n], S)
    else:
        rows = {"causal": [S] * L, "mask": [S] * (L - 1) + [n], "two-stream": [S + n] * (L - 1) + [n]}[path]
        macs = stack(D, rows, S, 0.5 if path == "causal" or path == "two-stream" and S >= kernels.LONG
                     else 1.0)
    macs += n * width * config.values + S * D * config.values if config.patch else n * D * config.vocab
    return 2 * 3 * macs


PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets; the first name that fits
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "L40": 181, "L4": 121,
    "A10G": 70, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}


def peak_flops(device):
    """Dense bf16 FLOP/s of a known GPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


# ---------------------------------------------------------------------------- device, precision, threads

def choose_device(name=None):
    """The device: the one asked for, or CUDA, or Apple's MPS, or the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise BadInput(f"--device {name} is not one of cuda, mps and cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(device, name=None):
    """Precision of the matrix products: bf16 on CUDA, and on a CPU whose bf16 products measure clearly
    faster."""
    if name is not None:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    info = cpu_info()  # on Intel without AMX, bf16 took 1.5 times as long as fp32 where it was measured
    fast = "amx_bf16" in info or "avx512_bf16" in info and "AuthenticAMD" in info
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Let glibc keep freed memory instead of returning it to the system after every step, so that a CPU
    step's large arrays need no fresh pages."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)            # M_MMAP_MAX: never a mapping of its own for a large array
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def processors():
    """How many processors this process may use at once: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "max 100000" or "200000 100000" microseconds
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):  # v1; -1 for none
        quota, period = (int(Path("/sys/fs/cgroup/cpu", f"cpu.cfs_{name}_us").read_text())
                         for name in ("quota", "period"))
        return max(1, min(count, round(quota / period))) if quota > 0 else count
    return count


def busy_processors(seconds=0.1):
    """How many processors other work keeps busy, in fractions. The load average still has what has just ended
    in it, and a short look misses what pauses: the lesser of the two."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    busy = os.getloadavg()[0]

    def jiffies():
        times = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(times), times[3] + times[4]  # all, and those idle or waiting for a disk
    with contextlib.suppress(OSError, ValueError, IndexError):
        (total, idle), _ = jiffies(), time.sleep(seconds)
        after, idle_after = jiffies()
        busy = min(busy, (os.cpu_count() or 1) * (1 - (idle_after - idle) / max(1, after - total)))
    return busy


def free_threads():
    """Threads for --threads: those that PyTorch would take, less what other work keeps busy. Threads without
    a processor of their own make the others wait at the end of every product, which is far slower than fewer
    threads."""
    most = min(torch.get_num_threads(), processors())
    if os.environ.get("OMP_NUM_THREADS") or most == 1:
        return most
    return max(1, min(most, round(processors() - busy_processors())))


# ---------------------------------------------------------------------------- one process or many

class LossModule(nn.Module):
    """The loss as a module, which is what the wrappers for several processes take."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch, path):
        return self.function(self.model, batch, path)


def join_group(device):
    """(number of this process, how many there are): torchrun says so in the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and (device is None or str(device).startswith("cuda"))
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the first may prepare data
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=24))
    return int(os.environ.get("RANK", "0")), world


@contextlib.contextmanager
def first_process_first(rank, world):
    """The others enter this block when the first process has left it."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def spread_out(module, device, world, fsdp=False):
    """(module whose gradients are averaged over the processes, function that switches this on for the next
    backward)."""
    if world == 1:
        return module, lambda on: None
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device.type, (world,))
        for block in module.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module, module.set_requires_gradient_sync
    wrapped = DistributedDataParallel(module)

    def synchronise(on):
        wrapped.require_backward_grad_sync = on  # what its no_sync() does
    return wrapped, synchronise


def whole(state):
    """A nested state dict whose tensors are all there, in place of FSDP's parts."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def restore(model, optimizer, content):
    """Load a checkpoint's weights and optimiser, cut into FSDP's parts where the model is."""
    parameters = dict(model.named_parameters())

    def like(value, parameter):
        parted = isinstance(parameter, DTensor) and value.shape == parameter.shape
        return distribute_tensor(value, parameter.device_mesh, parameter.placements) if parted else value

    model.load_state_dict({name: like(value, parameters.get(name)) for name,
                           value in content["model"].items()})
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {name: like(value, ordered[i]) for name, value in entry.items()}
             for i, entry in content["optimizer"]["state"].items()}
    groups = [{**saved, "fused": group["fused"]}
              for saved, group in zip(content["optimizer"]["param_groups"], optimizer.param_groups)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextlib.contextmanager
def stop_signals():
    """While this is open, Ctrl-C and SIGTERM append to the list it gives instead of ending the process."""
    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def compiled_loss(compiled):
    """loss_sum; where `compiled`, through torch.compile, one graph for each shape. Where that does not work,
    a sentence that says so: a run that is slow without a word would be worse."""
    if not compiled:
        return loss_sum

    def refuse(error):
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise BadInput(f"torch.compile does not work here ({reason}); type --no-compile to train without "
                       "it, slower, or "
                       "install the compiler that it needs") from error

    try:
        function = torch.compile(loss_sum, dynamic=False)
        torch._dynamo.config.recompile_limit = 64  # every size of a ramped batch is a graph of its own
    except RuntimeError as error:  # this Python or system has no torch.compile
        refuse(error)

    def call(*args):
        try:
            return function(*args)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            refuse(error)
    return call
