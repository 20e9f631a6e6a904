"""What benchmarks run on: options for device and precision, the clock, and what the device can do at most."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
from collections.abc import Iterator

import torch

from fx_approx.utils.timing import in_turn

DTYPES = ("float32", "bfloat16", "float16")
Quartiles = tuple[float, float, float]


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """The options ``--device``, ``--dtype`` and ``--tf32``."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32 (CUDA); without it they are not")


def add_autocast_option(parser: argparse.ArgumentParser) -> None:
    """The option ``--autocast``."""
    parser.add_argument("--autocast", choices=DTYPES[1:], help="forward under autocast to this, parameters in --dtype")


def autocast(device: str, dtype: str | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to a type by name; nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype=getattr(torch, dtype))


def enlarged(inputs: torch.Tensor, batch: int | None) -> torch.Tensor:
    """``batch`` examples, those of ``inputs`` over and over."""
    if batch is None:
        return inputs
    times = -(-batch // len(inputs))
    last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    made = inputs.detach().repeat(times, *[1] * (inputs.dim() - 1))[:batch]
    made = made.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return made.requires_grad_(inputs.requires_grad)


def refuse_device_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error where the device is not there or has no TF32."""
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, not {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: this torch sees no CUDA device")
    if options.tf32 and (options.device != "cuda" or options.dtype != "float32"):
        parser.error("--tf32: only on CUDA and with --dtype float32")


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Float32 products and convolutions in TF32 or not; torch's own default differs between the two."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def quartiles(values: list[float]) -> Quartiles:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def speedup(exact: list[float], taken: list[float]) -> Quartiles:
    """Quartiles of exact / this over neighbouring runs."""
    return quartiles([one / other for one, other in zip(exact, taken, strict=True)])


def shown(own: Quartiles) -> str:
    """The median, and the other two in brackets."""
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*own)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The best that was measured: operations and bytes a second."""

    flops: float
    bytes: float


def calibrate(device: str, dtype: torch.dtype, quick: bool = False) -> Peaks:
    """The best of a few square matrix products, and of a few copies, which read and write every byte.

    On CUDA the sizes are those that fill a large device; ``quick`` takes small ones, which tell little.
    """
    sizes = (256,) if quick else (4096, 8192) if device == "cuda" else (1024, 2048)
    count = 2**20 if quick else 2**28 if device == "cuda" else 2**25
    flops = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        (taken,) = in_turn([lambda a=a, b=b: a @ b], torch.device(device), 5, warmup=1)
        flops = max(flops, 2 * size**3 / min(taken))
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    (taken,) = in_turn([lambda: target.copy_(source)], torch.device(device), 5, warmup=1)
    return Peaks(flops, 2 * source.nbytes / min(taken))
