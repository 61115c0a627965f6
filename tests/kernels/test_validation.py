"""Bad input to the public operators is named, with what would be right."""

import pytest
import torch

from megatron_mhc import kernels


def mapping(n=2, channels=8, mixing="sinkhorn"):
    return [torch.zeros(*shape) for shape in kernels.mapping_shapes(mixing, n, channels).values()]


X = torch.zeros(3, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.mhc_pre(X.int(), *mapping()), r"x is \(3, 2, 8\) torch.int32"),
        (lambda: kernels.mhc_pre(X, *mapping(n=4)), r"fn is \(24, 32\): expected \(8, 16\)"),
        (
            lambda: kernels.mhc_pre(X, *[p.bfloat16() for p in mapping()]),
            "fn is torch.bfloat16: mapping parameters stay float32, in bf16",
        ),
        (lambda: kernels.mhc_pre(X, *mapping(), iterations=0), "iterations=0: at least 1"),
        (lambda: kernels.mhc_pre(X, *mapping(), eps=-1e-6), "eps=-1e-06: expected 0 <= eps"),
        (lambda: kernels.mhc_pre(X, *mapping(), norm_eps=2.0), "norm_eps=2.0"),
        (
            lambda: kernels.mhc_pre(X, *mapping(), residual_mixing="none"),
            "residual_mixing='none': expected one of sinkhorn, unconstrained, identity",
        ),
        (lambda: kernels.mhc_pre(X, *mapping(), backend="cuda"), "backend='cuda': expected one of"),
        (
            lambda: kernels.mhc_post(X, X[:, 0, :4], torch.ones(3, 2), torch.ones(3, 2, 2)),
            r"f is \(3, 4\): expected \(3, 8\)",
        ),
        (
            lambda: kernels.mhc_post(X, X[:, 0], torch.ones(3, 2), torch.ones(3, 2)),
            r"comb is \(3, 2\): expected \(3, 2, 2\)",
        ),
        (
            lambda: kernels.mhc_post(X, X[:, 0], torch.ones(3, 2).bfloat16(), torch.ones(3, 2, 2)),
            "post is torch.bfloat16: mappings stay float32",
        ),
        (
            lambda: kernels.mhc_replay(X, [None], [torch.ones(3, 2).half()]),
            r"pres\[0\] is torch.float16: mappings stay float32",
        ),
        (lambda: kernels.mhc_replay(X, [None], []), "1 merges and 0 pres: expected one of each"),
        (
            lambda: kernels.mhc_replay(X, [None, None], [X[..., 0]] * 2),
            r"merges\[1\] is None: only the first",
        ),
        (
            lambda: kernels.mhc_replay(X, [None], [torch.ones(3, 4)]),
            r"pres\[0\] is \(3, 4\): expected \(3, 2\)",
        ),
        (lambda: kernels.mhc_expand(X[:, 0], 0), "n=0: at least 1"),
        (lambda: kernels.sinkhorn(torch.zeros(3, 2)), r"logits are \(3, 2\): expected"),
        (lambda: kernels.sinkhorn(torch.zeros(2, 2).half()), "logits are torch.float16"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_triton_is_never_replaced_silently():
    with pytest.raises(RuntimeError, match="backend='triton'"):
        kernels.mhc_expand(torch.zeros(1, 2), 2, backend="triton")


def test_auto_says_once_why_it_took_torch(caplog, monkeypatch):
    monkeypatch.setattr("megatron_mhc.kernels.dispatch._said", set())
    for _ in range(2):
        kernels.mhc_expand(torch.zeros(1, 2), 2, backend="auto")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "PyTorch is in use, not Triton" in messages[0]
