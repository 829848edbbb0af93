"""Devices by their names, and what they compute in."""

from pathlib import Path

import pytest
import torch

from t2i_align.devices import has_bf16, resolve_device
from t2i_align.errors import T2IError

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.is_file(), reason="flags of the CPU are read from /proc/cpuinfo")
def test_bf16_of_a_cpu_is_what_its_flags_say():
    flags = CPUINFO.read_text().split()
    assert has_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16"} & set(flags))


def test_a_device_that_computes_nothing_has_no_bf16():
    assert not has_bf16(torch.device("meta"))


def test_names_of_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert resolve_device().type == "cuda"
    with pytest.raises(T2IError, match="Expected a device of this machine .* but got 'tpu'"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(T2IError, match="'cuda:0'"):
            resolve_device("cuda:0")
