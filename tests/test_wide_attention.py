"""Attention in fp32 on a CPU, in training's autocast and where activations are computed again."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from t2i_align.config import TrainConfig
from t2i_align.keys import generator
from t2i_align.training.precision import autocast
from t2i_align.wide_attention import WideAttention, recomputed

CPU = torch.device("cpu")


def tensors(number, tokens=5):
    return [torch.randn(2, 1, tokens, 4, generator=generator(i)).to(number).requires_grad_() for i in range(3)]


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16])
def test_fused_attention_is_computed_in_fp32(number):
    """Whether or not layers before it cast, with and without gradients; its output has autocast's type."""
    q, k, v = tensors(number)
    mask = torch.zeros(5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    with autocast(CPU, TrainConfig(steps=1, precision="bf16")):
        with torch.no_grad():
            drawn = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(number))
        replayed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(number))
    assert replayed.dtype == torch.bfloat16
    assert torch.equal(drawn, replayed)
    assert torch.equal(replayed, exact.bfloat16())
    replayed.float().sum().backward()
    assert q.grad.dtype == number
    assert v.grad.any()


def test_attention_outside_of_autocast_is_left_as_it_is():
    q, k, v = tensors(torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v)
    with autocast(CPU, TrainConfig(steps=1, precision="bf16")), torch.autocast("cpu", enabled=False):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), exact)
    with autocast(CPU, TrainConfig(steps=1)):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), exact)


class Counted:
    """A context that knows how often it was entered."""

    times = 0

    def __enter__(self):
        self.times += 1

    def __exit__(self, *error):
        pass


def test_attention_of_many_tokens_is_left_as_it_is():
    attend = F.scaled_dot_product_attention
    for tokens, same in ((5, False), (600, True)):
        q, k, v = tensors(torch.bfloat16, tokens)
        with WideAttention():
            found = attend(query=q, key=k, value=v)
        assert torch.equal(found, attend(q, k, v)) == same


@pytest.mark.parametrize("wide", [True, False])
def test_activations_are_computed_again_in_every_backward_pass(wide):
    """In the context given; gradients are those of a pass that keeps its activations."""
    gradients, under = [], Counted()
    for again in (True, False):
        q, k, v = tensors(torch.bfloat16)
        with WideAttention() if wide else nullcontext():
            attend = F.scaled_dot_product_attention
            out = recomputed(attend, q, k, v, under=under) if again else attend(q, k, v)
        for _ in range(2):
            out.float().square().sum().backward(retain_graph=True)
        gradients.append([x.grad for x in (q, k, v)])
    assert under.times == 2
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_wide_pass_is_recomputed_wide():
    """Else torch would refuse the second pass: its tensors would have another type."""
    q, k, v = tensors(torch.bfloat16)
    with WideAttention():
        out = recomputed(F.scaled_dot_product_attention, q, k, v)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(out, exact.bfloat16())
    (mine,) = torch.autograd.grad(out.float().sum(), q)
    (right,) = torch.autograd.grad(exact.sum(), q)
    assert torch.equal(mine, right)
