"""What Inductor makes of a hoisted graph: slices, norms and statistics are fused, and only products are calls."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import fx_approx
from fx_approx.policies import Uniform


@pytest.mark.slow
def test_gathers_and_norms_are_fused_into_their_neighbours() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    conv, norm = nn.Conv2d, nn.BatchNorm2d
    layers = conv(32, 64, 3), norm(64), nn.ReLU(), conv(64, 64, 3), norm(64), nn.ReLU(), conv(64, 32, 3)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last)
    policy = Uniform(0.5)
    compiled = torch.compile(fx_approx.transform(model, policy, x), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (forward, backward) = run_and_get_code(lambda: compiled(x).sum().backward())
    kernels = re.findall(r"^(cpp_fused_\w+) = async_compile", forward, re.MULTILINE)
    assert len(kernels) <= 6
    assert any("linalg_vector_norm" in name for name in kernels)
    assert all(
        not {"index_select", "batch_norm"} - set(re.findall("index_select|batch_norm", name)) for name in kernels[-2:]
    )
    assert len(re.findall(r"extern_kernels\.convolution\(", forward)) == 3
    assert len(re.findall(r"aten\.convolution_backward\.default\(", backward)) == 3
    for code in (forward, backward):
        assert not re.search(r"torch\.ops\.aten\.(index|index_select|gather|index_put)\b.*\(buf", code)
