"""Calls are checked once for each kind, and only where nothing else could change the answer."""

from dataclasses import dataclass, replace

import pytest
import torch

from megatron_mhc.kernels import served


@dataclass(frozen=True)
class Kind:
    """A tensor as the memory of checked calls sees it."""

    shape: tuple[int, ...] = (3, 4, 8)
    dtype: torch.dtype = torch.bfloat16
    device: int = 0

    def get_device(self):
        return self.device


@pytest.fixture
def calls(monkeypatch):
    """What was checked, and a function of tensors and options that makes a call."""
    checked = []
    monkeypatch.setattr(served, "_PLAIN", {Kind})
    monkeypatch.setattr(served, "_served", set())
    monkeypatch.setattr(served, "choose_backend", lambda backend, *_, **__: backend)

    def check(*arguments):
        checked.append(arguments)
        if "wrong" in arguments:
            raise ValueError("wrong")

    def call(*tensors, backend="triton", options=(1e-6,), check=check, mixing="sinkhorn"):
        return served.serves(check, backend, tensors, *options, residual_mixing=mixing)

    return checked, call


CASES = {
    "shape": lambda kind: {"tensors": (kind, replace(kind, shape=(4, 4, 8)))},
    "dtype": lambda kind: {"tensors": (kind, replace(kind, dtype=torch.float32))},
    "device": lambda kind: {"tensors": (kind, replace(kind, device=1))},
    "option": lambda kind: {"options": (1e-5,)},
    "mixing": lambda kind: {"mixing": "identity"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_kind_is_checked_once(calls, case):
    checked, call = calls
    kind = Kind()
    assert call(kind, kind)
    assert call(Kind(), Kind())
    assert checked == [(kind, kind, 1e-6)]
    other = CASES[case](kind)
    tensors = other.pop("tensors", (kind, kind))
    assert call(*tensors, **other)
    assert len(checked) == 2
    assert call(*tensors, **other)
    assert call(kind, kind)
    assert len(checked) == 2


def test_another_call_of_the_same_tensors_is_checked(calls):
    _, call = calls
    call(Kind())
    with pytest.raises(ZeroDivisionError):
        call(Kind(), check=lambda *_: 1 / 0)


def test_what_is_wrong_is_found_every_time(calls):
    checked, call = calls
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            call(Kind(), options=("wrong",))
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("tensor", "options"), [(Kind(device=-1), {}), (Kind(), {"backend": "torch"})]
)
def test_only_what_triton_serves_on_a_gpu_is_remembered(calls, tensor, options):
    checked, call = calls
    for _ in range(2):
        assert call(tensor, **options) == (options.get("backend") != "torch")
    assert len(checked) == 2
    assert not served._served


@pytest.mark.parametrize("tracer", ["compiler", "subclass"])
def test_tracers_leave_nothing_behind(calls, monkeypatch, tracer):
    """Their shapes need have no hash."""
    checked, call = calls
    if tracer == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(served, "_PLAIN", {torch.Tensor})
    for _ in range(2):
        assert call(Kind(shape=[3, 4, 8]))
    assert len(checked) == 2
    assert not served._served


def test_memory_is_bounded(calls, monkeypatch):
    checked, call = calls
    monkeypatch.setattr(served, "REMEMBERED", 4)
    for tokens in range(10):
        call(Kind(shape=(tokens, 4, 8)))
        assert len(served._served) <= 4
    assert len(checked) == 10
