"""What a policy promises on every pipeline family; adding a family adds its tests."""

import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin

from t2i_align.keys import generator
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from t2i_align.policy import Policy, PolicyError
from t2i_align.policy.artefacts import is_portable
from tests.families import FAMILIES, PROMPTS

WITHOUT_LAYERS = ("toy", "toy-flow")  # a closed form
ADAPTABLE = [name for name in FAMILIES if name not in WITHOUT_LAYERS]
# Layers whose output nothing reads: the text stream of a last block, attention over a single token.
IDLE = ("add_q_proj", "to_add_out", "add_time_condition.attention")


class Built:
    """A family with a driver, one prompt and starting latents; weights are the same in every one."""

    def __init__(self, name, dtype=torch.float32):
        torch.manual_seed(0)
        self.name, self.family = name, FAMILIES[name]()
        self.pipe = self.family.pipe
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                for module in part.to(dtype).modules():
                    module.training = type(module).__name__ == self.family.training
                for key, p in part.named_parameters():  # as from_pretrained does
                    if any(word in key for word in getattr(part, "_keep_in_fp32_modules", None) or ()):
                        p.data = p.data.float()
        self.driver = Driver(self.pipe, **self.family.call)
        self.driver.network.requires_grad_(False)  # with gradients torch takes another path and rounds otherwise
        for key, p in self.driver.network.named_parameters():
            if not p.any():  # gates start at zero and would hide what they gate
                p.data = 0.1 * torch.randn(p.shape, generator=generator("gate", key)).to(p)
        self.said = {"prompt": [PROMPTS[0]]} if self.family.embeds is None else cast(self.family.embeds(1), dtype)
        self.cond = (
            self.driver.encode(PROMPTS[:1]) if self.family.embeds is None else self.driver.condition(**self.said)
        )
        self.x = self.driver.start(self.cond, self.family.steps, seed=1)

    def step(self):
        return self.driver.step(self.x, 0, self.cond, self.family.steps, ddim(1.0)).q.mean

    @torch.no_grad()
    def image(self):
        said = {name: list(value) if isinstance(value, list) else value for name, value in self.said.items()}
        call = {**self.family.call, **said, "num_inference_steps": self.family.steps, "output_type": "pt"}
        return self.pipe(generator=[generator(1, "start", 0)], **call)[0]


def cast(tree, dtype):
    if isinstance(tree, dict):
        return {name: cast(part, dtype) for name, part in tree.items()}
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return type(tree)(cast(part, dtype) for part in tree) if isinstance(tree, list | tuple) else tree


def train(policy, size=0.3):
    """Stands for a training: moves the weights away from the start."""
    for i, p in enumerate(policy.trainable()):
        p.data += size * torch.randn(p.shape, generator=generator("training", i)).to(p)


def gradients(policy, built):
    if "d/dw" in built.family.cannot:
        pytest.skip(built.family.cannot["d/dw"])
    for p in policy.trainable():
        p.grad = None
    built.step().square().mean().backward()
    return [p.grad for p in policy.trainable()]


@pytest.fixture(scope="module", params=ADAPTABLE)
def base(request):
    return Built(request.param)


@pytest.fixture(scope="module")
def untrained(base):
    built = Built(base.name)
    return built, Policy.lora(built.pipe, rank=2, alpha=4)


@pytest.fixture(scope="module")
def trained(base):
    built = Built(base.name)
    policy = Policy.lora(built.pipe, rank=2, alpha=4)
    train(policy)
    return built, policy


@torch.no_grad()
def test_a_new_policy_is_the_base_bit_for_bit(base, untrained):
    built, policy = untrained
    assert torch.equal(built.step(), base.step())
    with policy.reference():
        assert torch.equal(built.step(), base.step())


@torch.no_grad()
def test_the_reference_of_a_trained_policy_is_the_base_bit_for_bit(base, trained):
    built, policy = trained
    with policy.reference():
        assert torch.equal(built.step(), base.step())
    assert not torch.allclose(built.step(), base.step(), atol=1e-4)


def test_gradients_reach_all_lora_weights(trained):
    built, policy = trained
    reached = zip(policy.weights.weights("policy"), gradients(policy, built), strict=True)
    still = [name for name, gradient in reached if gradient is None or not gradient.any()]
    assert all(any(part in name for part in IDLE) for name in still)
    frozen = {id(p) for p in policy.network.parameters()} - {id(p) for p in policy.trainable()}
    assert all(p.grad is None for p in policy.network.parameters() if id(p) in frozen)


def test_gradient_checkpointing_changes_no_gradient(trained):
    built, policy = trained
    if not policy.network._supports_gradient_checkpointing or isinstance(built.pipe, PAGMixin):
        with pytest.raises(PolicyError, match="no gradient checkpointing"):
            Policy.lora(Built(built.name).pipe, gradient_checkpointing=True)
        return
    if built.name != "kandinsky5":  # which makes embeddings in float32
        built = Built(built.name, torch.float64)  # rounding differs by CPUs: it should not count
        policy = Policy.lora(built.pipe, rank=2, alpha=4)
        for p in policy.trainable():
            p.data = p.data.double()
        train(policy)
    whole = gradients(policy, built)
    policy.network.enable_gradient_checkpointing(policy.switch.checkpointed)
    again = gradients(policy, built)
    policy.network.disable_gradient_checkpointing()
    for first, second in zip(whole, again, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6 * float(first.abs().max()))


def test_a_half_precision_base_has_full_precision_lora(base):
    built = Built(base.name, torch.bfloat16)
    policy = Policy.lora(built.pipe, rank=2)
    assert {p.dtype for p in policy.trainable()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in policy.network.parameters()}
    assert any(gradient is not None and gradient.any() for gradient in gradients(policy, built))


def test_saved_lora_opens_in_the_stock_pipeline(trained, tmp_path):
    built, policy = trained
    policy.save(tmp_path / "lora")
    again = Policy.load(Built(built.name).pipe, tmp_path / "lora")
    assert all(torch.equal(p, q) for p, q in zip(policy.trainable(), again.trainable(), strict=True))
    stock = Built(built.name)
    if not is_portable(built.pipe, policy.component, policy.network):
        assert (tmp_path / "lora" / "adapter_config.json").is_file()
        weights = policy.weights.weights("policy").items()
        with pytest.raises(AttributeError):  # of the pipeline, its network, or what its mixin expects of it
            stock.pipe.load_lora_weights({f"{policy.component}.{key}": p.detach() for key, p in weights})
        return
    before = stock.image()
    stock.pipe.load_lora_weights(tmp_path / "lora")
    assert float((stock.image() - built.image()).abs().max()) < 1e-4
    assert float((before - built.image()).abs().max()) > 2e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_full_weights(name, tmp_path):
    base, built = Built(name), Built(name)
    policy = Policy.full(built.pipe)
    with torch.no_grad():
        torch.testing.assert_close(built.step(), base.step())
        train(policy, 0.01)
        assert not torch.equal(built.step(), base.step())
        with policy.reference():
            torch.testing.assert_close(built.step(), base.step())
    policy.save(tmp_path / "model")
    absent = {part: None for part, value in built.pipe.components.items() if value is None}
    opened = type(built.pipe).from_pretrained(tmp_path / "model", **absent)
    weights = getattr(opened, policy.component).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in policy.network.state_dict().items())
    assert any(gradient is not None and gradient.any() for gradient in gradients(policy, built))


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_a_network_without_layers_is_refused(name):
    with pytest.raises(PolicyError, match=r"no linear layer: train it with Policy\.full"):
        Policy.lora(Built(name).pipe)
