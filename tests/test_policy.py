"""The policy's contexts, averages and adapters; what it leaves on disk is in test_policy_artefacts.py."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from t2i_align.config import TrainConfig
from t2i_align.keys import generator
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from t2i_align.policy import Policy, PolicyError
from t2i_align.training import Method, Term, fit
from tests.families import FAMILIES

STEPS = 3


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    made = FAMILIES["sd"]().pipe
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return made


class Setting:
    """A pipeline with a policy, and one step of it."""

    def __init__(self, pipe, kind="lora", **options):
        self.pipe, self.driver = pipe, Driver(pipe, guidance_scale=3.0)
        self.cond = self.driver.encode(["a red circle", "a cat"])
        self.x = self.driver.start(self.cond, STEPS, seed=1)
        self.policy = Policy.lora(pipe, rank=2, **options) if kind == "lora" else Policy.full(pipe, **options)

    def mean(self, x=None):
        return self.driver.step(self.x if x is None else x, 0, self.cond, STEPS, ddim(1.0)).q.mean

    def gradients(self, loss):
        for p in self.policy.network.parameters():
            p.grad = None
        loss.backward()
        return [p.grad.clone() for p in self.policy.trainable()]


@pytest.fixture(params=["lora", "full"])
def setting(request, pipe):
    """A trained policy of either kind, with an average of other weights."""
    made = Setting(pipe, request.param)
    change(made.policy.trainable(), "first")
    made.policy.update_average(0.5)
    change(made.policy.trainable(), "second")
    return made


@pytest.fixture
def two(pipe):
    """A policy with a second adapter of other weights."""
    made = Setting(pipe, adapters=("policy", "old"))
    change(made.policy.trainable(), "policy")
    change(made.policy.adapters.weights("old").values(), "old")
    return made


def change(weights, *name, size=0.05):
    for i, p in enumerate(weights):
        p.data += size * torch.randn(p.shape, generator=generator(*name, i))


def flags(network):
    return {name: (p.requires_grad, p._version) for name, p in network.named_parameters()}


# What is trained


def test_a_method_that_holds_it_exposes_the_adapter_alone(two):
    method = Method()
    method.policy = two.policy
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [id(p) for p in trained.values()] == [id(p) for p in two.policy.trainable()]
    assert all(".lora_A.policy." in name or ".lora_B.policy." in name for name in trained)
    assert two.policy.network is two.pipe.unet


def test_all_weights_are_exposed(pipe):
    policy = Policy.full(pipe)
    assert len(policy.trainable()) == len(list(pipe.unet.parameters()))
    assert all(p.requires_grad for p in policy.parameters())


def test_rank_alpha_and_targets(pipe):
    policy = Policy.lora(pipe, rank=3, alpha=1.5, targets=["attn2.to_q", "conv_in"])
    shape = policy.adapters.shape("policy")
    assert set(shape.values()) == {(3, 1.5)}
    assert "conv_in" in shape
    assert {name.rpartition(".")[2] for name in shape} == {"to_q", "conv_in"}
    assert {p.shape[0] for p in policy.trainable()[::2]} == {3}


def test_default_targets_are_the_projections_of_attention(pipe):
    names = Policy.lora(pipe).adapters.shape("policy")
    assert {name.partition(".transformer_blocks.0.")[2] for name in names} == {
        f"attn{i}.{end}" for i in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_starting_weights_are_keyed_by_the_seed():
    def start(seed):
        torch.manual_seed(0)
        pipe = FAMILIES["sd"]().pipe
        torch.manual_seed(seed + 10)
        state = torch.get_rng_state()
        weights = Policy.lora(pipe, rank=2, seed=seed).trainable()
        assert torch.equal(torch.get_rng_state(), state)
        return weights

    first, second, third = start(0), start(0), start(1)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first[::2], third[::2], strict=True))
    for a, b in zip(first[::2], first[1::2], strict=True):
        assert 0.5 < float(a.detach().abs().max()) * a.shape[1] ** 0.5 <= 1
        assert not b.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of 1 or more but got 0"),
        ({"alpha": -1.0}, "positive alpha but got -1"),
        ({"targets": ["to_qq"]}, r"No layer of UNet2DConditionModel ends in 'to_qq'.*Did you mean"),
        ({"targets": "to_q"}, "list of endings"),
        ({"component": "unnet"}, "no network 'unnet'; it has vae"),
        ({"component": "text_encoder", "gradient_checkpointing": True}, "no gradient checkpointing"),
        ({"adapters": ()}, "list of names"),
        ({"adapters": ("a.b",)}, "letters, digits"),
        ({"adapters": ("keys",)}, "no method"),
        ({"adapters": ("a", "a")}, "already has an adapter 'a'"),
        ({"start": "nowhere", "rank": 4}, "leave them out"),
        ({"start": "nowhere"}, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(pipe, options, message):
    with pytest.raises(PolicyError, match=message):
        Policy.lora(pipe, **options)


def test_full_weights_refuse_lora_and_have_no_adapters(pipe):
    with pytest.raises(PolicyError, match="all weights are trained"):
        Policy.full(pipe, component="vae").add_adapter("old")
    Policy.lora(pipe)
    with pytest.raises(PolicyError, match="without LoRA"):
        Policy.full(pipe)


# Contexts


def test_contexts_between_forward_and_backward_change_no_gradient(two):
    policy = two.policy
    plain = two.gradients(two.mean().square().sum())
    before = flags(policy.network)

    loss = two.mean().square().sum()
    with policy.reference():
        base = two.mean()
        with policy.adapter("old"):
            old = two.mean()
    with policy.adapter("old"), torch.no_grad():
        assert torch.equal(two.mean(), old)
    assert flags(policy.network) == before
    assert not base.requires_grad
    assert not old.requires_grad
    mixed = two.gradients(loss + 0 * (base + old).sum())
    assert all(torch.equal(p, q) for p, q in zip(plain, mixed, strict=True))
    assert all(p.grad is None for p in policy.adapters.weights("old").values())


def test_forward_paths_differ_and_come_back(setting):
    policy = setting.policy
    own = setting.mean().detach()
    with policy.reference():
        reference = setting.mean().detach()
        with policy.averaged():
            average = setting.mean().detach()
            with policy.averaged(), policy.reference():
                assert torch.equal(setting.mean(), reference)
            assert torch.equal(setting.mean(), average)
        assert torch.equal(setting.mean(), reference)
    assert torch.equal(setting.mean(), own)
    for one, other in ((own, reference), (own, average), (reference, average)):
        assert not torch.allclose(one, other, atol=1e-4)


def test_contexts_leave_flags_and_mode_and_come_back_after_an_error(setting):
    policy, own = setting.policy, setting.mean().detach()
    policy.network.train()
    policy.network.mid_block.eval()
    before, modes = flags(policy.network), [part.training for part in policy.network.modules()]
    with policy.averaged():
        assert [part.training for part in policy.network.modules()] == modes

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), policy.averaged(), policy.reference():
        fail()
    assert flags(policy.network) == before
    assert [part.training for part in policy.network.modules()] == modes
    policy.network.eval()
    assert torch.equal(setting.mean(), own)
    policy.refuse_open_context()


def test_a_backward_pass_inside_a_context_is_refused(setting):
    loss = setting.mean().square().sum()
    with setting.policy.reference(), pytest.raises(PolicyError, match="a backward pass outside of reference"):
        loss.backward(retain_graph=True)
    assert all(p.grad is None for p in setting.policy.trainable())
    first, *_ = setting.policy.trainable()
    with setting.policy.averaged(), pytest.raises(PolicyError, match="a backward pass"):
        torch.autograd.grad(loss, [first], retain_graph=True)
    loss.backward()


def test_gradients_in_the_latents_may_be_taken_inside_a_context(setting):
    x = setting.x.clone().requires_grad_()
    with setting.policy.reference():
        (inside,) = torch.autograd.grad(setting.mean(x).square().sum(), [x])
        loss = setting.mean(x).square().sum()
    (outside,) = torch.autograd.grad(loss, [x])
    assert inside.any()
    assert torch.equal(inside, outside)


def test_a_yield_inside_a_context_is_found(setting):
    def losses(outside):
        with setting.policy.reference():
            base = setting.mean()
            if not outside:
                yield base.sum()
        yield (setting.mean() - base).square().sum()

    for _ in losses(outside=True):
        setting.policy.refuse_open_context()
    terms = losses(outside=False)
    next(terms)
    for call in (
        setting.policy.refuse_open_context,
        lambda: setting.policy.update_average(0.9),
        lambda: setting.policy.save("nowhere"),
        lambda: Policy.full(setting.pipe),
    ):
        with pytest.raises(PolicyError, match="such a context is open"):
            call()
    terms.close()
    setting.policy.refuse_open_context()


def test_policies_of_one_network_share_a_lock_and_stand_on_each_other(two):
    own = two.mean().detach()
    above = Policy.lora(two.pipe, rank=1, adapters=("above",))
    change(above.trainable(), "above")
    both = two.mean().detach()
    assert not torch.equal(both, own)
    with above.reference():
        assert torch.equal(two.mean(), own)
    assert not any(p.requires_grad for p in two.policy.trainable())
    order = []

    def other():
        with above.reference():
            order.append("second")

    thread = threading.Thread(target=other)
    with two.policy.reference():
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert torch.equal(two.mean(), both)


def test_loaded_lora_belongs_to_the_base(pipe, tmp_path):
    first = Setting(pipe)
    change(first.policy.trainable(), "first")
    first.policy.save(tmp_path / "lora")
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    pipe.unet.eval()
    pipe.load_lora_weights(tmp_path / "lora")
    second = Setting(pipe)
    assert torch.equal(second.mean(), first.mean())
    assert sum(p.requires_grad for p in pipe.unet.parameters()) == len(second.policy.trainable())
    change(second.policy.trainable(), "second")
    with second.policy.reference():
        assert torch.equal(second.mean(), first.mean())
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="later")
    with pytest.raises(PolicyError, match="'policy' to be active but the network uses later"):
        second.policy.refuse_open_context()


def test_fused_lora_is_refused(two):
    two.pipe.fuse_lora(components=["unet"])
    with pytest.raises(PolicyError, match="unfuse_lora"):
        Policy.lora(two.pipe, adapters=("more",))


def test_a_network_is_freed_with_its_policy(pipe):
    network = weakref.ref(Setting(pipe, gradient_checkpointing=True).policy.network)
    del pipe.unet
    pipe.__dict__.clear()
    gc.collect()
    assert network() is None


# Gradient checkpointing


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_works_in_eval_mode_and_changes_no_gradient(pipe, kind):
    made = Setting(pipe, kind)
    change(made.policy.trainable(), "trained")
    calls = []
    made.policy.network.up_blocks[1].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    whole = made.gradients(made.mean().square().sum())
    assert len(calls) == 1
    pipe.unet.enable_gradient_checkpointing(made.policy.switch.checkpointed)
    again = made.gradients(made.mean().square().sum())
    assert len(calls) == 3
    for first, second in zip(whole, again, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_recomputation_takes_the_path_of_its_forward_pass(setting):
    """Backward passes through graphs of a context come after the context, or inside another."""

    def gradients():
        x = setting.x.clone().requires_grad_()
        with setting.policy.reference():
            inside = setting.mean(x).square().sum()
        (first,) = torch.autograd.grad(inside, [x], retain_graph=True)
        (again,) = torch.autograd.grad(inside, [x])
        outside = setting.mean(x).square().sum()
        with setting.policy.averaged():
            (third,) = torch.autograd.grad(outside, [x])
        assert torch.equal(first, again)
        return first, third

    whole = gradients()
    setting.pipe.unet.enable_gradient_checkpointing(setting.policy.switch.checkpointed)
    for first, second in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    setting.policy.refuse_open_context()


# Averages and adapters


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_average_follows_its_formula(pipe, kind):
    made = Setting(pipe, kind)
    with pytest.raises(PolicyError, match="no average"):
        made.policy.averaged()
    expected = [p.detach().clone() for p in made.policy.trainable()]
    made.policy.update_average(0.9)
    for step in range(3):
        change(made.policy.trainable(), "step", step)
        made.policy.update_average(0.9)
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, made.policy.trainable(), strict=True)]
    own = [p.detach().clone() for p in made.policy.trainable()]
    with made.policy.averaged():
        average = made.mean().detach()
    for p, value in zip(made.policy.trainable(), expected, strict=True):
        p.data.copy_(value)
    torch.testing.assert_close(made.mean(), average, rtol=1e-5, atol=1e-5)
    assert sum(p.requires_grad for p in made.policy.parameters()) == len(own)


def test_adapters_are_copied(two):
    policy = two.policy
    own = two.mean().detach()
    policy.add_adapter("copy", like="policy")
    with policy.adapter("copy"):
        assert torch.equal(two.mean(), own)
    policy.copy_adapter("policy", "old")
    with policy.adapter("old"):
        assert torch.equal(two.mean(), own)
    change(policy.trainable(), "later")
    with policy.adapter("copy"):
        assert torch.equal(two.mean(), own)
    assert torch.isfinite(two.gradients(two.mean().sum())[0]).all()


def test_adapters_may_have_other_ranks_and_layers(two):
    policy = two.policy
    own, before = two.mean().detach(), flags(policy.network)
    policy.add_adapter("small", rank=1, alpha=3.0, targets=["to_out.0", "conv_out"], seed=1)
    assert torch.equal(two.mean(), own)
    after = flags(policy.network)
    assert {name: after[name] for name in before if name in after} == {n: f for n, f in before.items() if n in after}
    assert not any(p.requires_grad for p in policy.adapters.weights("small").values())
    with policy.adapter("small"), policy.reference():
        base = two.mean().detach()
    with policy.adapter("small"):
        assert torch.equal(two.mean(), base)
    change(policy.adapters.weights("small").values(), "small")
    with policy.adapter("small"):
        assert not torch.equal(two.mean(), base)
    with pytest.raises(PolicyError, match="same layers, ranks and alphas"):
        policy.copy_adapter("policy", "small")
    with pytest.raises(PolicyError, match="No adapter 'smal'.*Did you mean 'small'"):
        policy.adapter("smal")


# In training


class TowardsBrightness(Method):
    """Pull the next latent's mean up, with a penalty for leaving the base."""

    def __init__(self, setting):
        super().__init__()
        self.policy, self.setting = setting.policy, [setting]

    def losses(self, ctx, batch):
        (setting,) = self.setting
        with self.policy.reference():
            base = setting.mean()
        mean = setting.mean()
        yield Term(0.01 * (mean - base).square().mean() - mean.mean(), {"mean": mean.mean()})
        self.policy.refuse_open_context()


def test_fit_trains_the_adapter_and_nothing_else(pipe, tmp_path):
    made = Setting(pipe, adapters=("policy", "old"))
    frozen = {name: p.clone() for name, p in pipe.unet.named_parameters() if not p.requires_grad}
    before = made.mean().mean()
    config = TrainConfig(steps=5, learning_rate=0.02)
    state = fit(TowardsBrightness(made), lambda step: None, config, tmp_path)
    assert made.mean().mean() > before + 0.01
    assert len(state.weights) == len(made.policy.trainable())
    now = dict(pipe.unet.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
