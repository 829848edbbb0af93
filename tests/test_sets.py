import pytest
import torch
from PIL import Image
from torch import nn

from t2i_align.rewards import FunctionScorer, RewardError, load_reward, scorer_class
from t2i_align.rewards.features import extract_features, load_features
from t2i_align.rewards.inception import Inception
from t2i_align.rewards.set_rewards import CMMD, FID, Vendi
from t2i_align.rewards.sets import (
    cmmd,
    cmmd_contributions,
    frechet,
    frechet_contributions,
    vendi,
    vendi_contributions,
)
from tests import tiny_scorers as tiny


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard(n, d, seed=0):
    """Features (n, d) whose sample mean is 0 and whose covariance (ddof 1) is the identity, exactly."""
    off = normal(n, d, seed=seed)
    off = off - off.mean(0)
    return off @ torch.linalg.inv(torch.linalg.cholesky(off.T @ off / (n - 1))).T


# closed forms


def test_a_shift_of_gaussians_costs_its_square():
    features = standard(50, 6)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    assert frechet(features, features + shift).item() == pytest.approx(shift.square().sum().item())
    assert frechet(features, features).item() == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize(("a", "b"), [(4.0, 9.0), (1.0, 0.25)])
def test_scaled_identities_cost_d_times_the_squared_difference_of_roots(a, b):
    features = standard(50, 6)
    assert frechet(a**0.5 * features, b**0.5 * features).item() == pytest.approx(6 * (a**0.5 - b**0.5) ** 2)


def test_the_one_dimensional_case():
    features = standard(20, 1)
    assert frechet(features, 2 * features + 1).item() == pytest.approx(2.0)  # N(0, 1) and N(1, 4)


def test_frechet_is_scipys_and_takes_few_samples():
    from scipy.linalg import sqrtm

    a, b = normal(30, 5), 1.3 * normal(40, 5, seed=1) + 0.2
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    torch.testing.assert_close(frechet(a, b), expected)
    assert frechet(normal(3, 50), normal(4, 50, seed=1)).isfinite()
    shrunk = frechet(a, b, shrink=0.1)
    assert shrunk.isfinite()
    assert shrunk != frechet(a, b)


def test_cmmd_is_about_ten_times_the_squared_distance_of_means():
    a = nn.functional.normalize(normal(60, 16), dim=1)
    b = nn.functional.normalize(normal(60, 16, seed=1) + 0.3, dim=1)
    distance = 10 * (a.mean(0) - b.mean(0)).square().sum().item()
    assert cmmd(a, b).item() == pytest.approx(distance, rel=0.02)
    assert cmmd(7 * a, b).item() == pytest.approx(cmmd(a, b).item())  # features are normalised
    assert cmmd(a, a).item() == pytest.approx(0.0, abs=1e-9)


def test_cmmd_of_two_points():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    kernel = torch.exp(torch.tensor(-2 / 200.0, dtype=torch.float64)).item()
    assert cmmd(a, b).item() == pytest.approx(1000 * (2 - 2 * kernel))


def test_vendi_counts_different_images():
    assert vendi(torch.ones(7, 3)).item() == pytest.approx(1.0)
    assert vendi(torch.eye(7)).item() == pytest.approx(7.0)
    assert vendi(5 * torch.eye(4)[[0, 0, 0, 2, 2, 2]]).item() == pytest.approx(2.0)
    features = normal(9, 4)
    assert vendi(features).item() == pytest.approx(vendi(torch.cat([features, torch.zeros(9, 20)], 1)).item())


# contributions, against refits


def refit(function, features):
    return torch.stack([function(torch.cat([features[:i], features[i + 1 :]])) for i in range(len(features))])


@pytest.mark.parametrize(("n", "d"), [(3, 4), (8, 8), (6, 40), (40, 6), (30, 16)])
def test_contributions_equal_those_of_n_refits(n, d):
    a, b = normal(n, d), 1.5 * normal(25, d, seed=1) + 0.3
    torch.testing.assert_close(vendi_contributions(a), vendi(a) - refit(vendi, a), rtol=1e-9, atol=1e-9)
    for function, fast in ((frechet, frechet_contributions), (cmmd, cmmd_contributions)):
        slow = refit(lambda rest, function=function: function(rest, b), a) - function(a, b)
        torch.testing.assert_close(fast(a, b), slow, rtol=1e-8, atol=1e-8)
    slow = refit(lambda rest: frechet(rest, b, 0.01), a) - frechet(a, b, 0.01)
    torch.testing.assert_close(frechet_contributions(a, b, 0.01), slow, rtol=1e-8, atol=1e-8)


def test_contributions_of_copies_and_near_copies():
    clusters = torch.eye(5)[[0, 0, 0, 1, 3]].double()
    torch.testing.assert_close(vendi_contributions(clusters), vendi(clusters) - refit(vendi, clusters))
    near = normal(8, 5)
    near[1] = near[0] + 1e-6 * near[1]
    torch.testing.assert_close(vendi_contributions(near), vendi(near) - refit(vendi, near), rtol=1e-7, atol=1e-7)
    assert vendi_contributions(torch.ones(2, 3)).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert vendi_contributions(torch.eye(2)).tolist() == pytest.approx([1.0, 1.0])


def test_a_collapsed_set_has_no_better_or_worse_image():
    copies, b = torch.ones(4, 3), normal(20, 3)
    assert frechet_contributions(copies, b).tolist() == pytest.approx([0.0] * 4, abs=1e-9)
    assert cmmd_contributions(copies, b).tolist() == pytest.approx([0.0] * 4, abs=1e-9)
    assert vendi_contributions(copies).tolist() == pytest.approx([0.0] * 4, abs=1e-9)


def test_a_copy_adds_less_than_a_new_image_and_an_outlier_hurts():
    features = torch.eye(5)[[0, 0, 1, 2, 3]]
    assert vendi_contributions(features).argsort()[:2].sort().values.tolist() == [0, 1]
    a, b = normal(40, 3), normal(400, 3, seed=1)
    a[7] += 6
    assert frechet_contributions(a, b).argmin() == 7


def test_too_few_images_are_refused():
    for function in (
        lambda: vendi_contributions(torch.ones(1, 3)),
        lambda: frechet(torch.ones(1, 3), torch.ones(5, 3)),
    ):
        with pytest.raises(RewardError, match="of 2 or more images"):
            function()
    with pytest.raises(RewardError, match="3 or more"):
        frechet_contributions(torch.ones(2, 3), torch.ones(5, 3))


# as rewards


def corners(images):
    return images[:, :, :2, :2].flatten(1)


IMAGES = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_diversity_is_a_reward_of_the_prompts_images():
    prompts = ["p", "q"] * 4
    scores = Vendi(corners).scores(IMAGES, prompts)
    torch.testing.assert_close(scores.total[::2], vendi_contributions(corners(IMAGES[::2])).float())
    torch.testing.assert_close(scores.total[1::2], vendi_contributions(corners(IMAGES[1::2])).float())
    torch.testing.assert_close(Vendi(corners).scores(IMAGES, prompts, batch_size=3).total, scores.total)
    whole = Vendi(corners, per="call").scores(IMAGES, prompts).total
    torch.testing.assert_close(whole, vendi_contributions(corners(IMAGES)).float())
    with pytest.raises(RewardError, match="2 or more images of each prompt"):
        Vendi(corners).scores(IMAGES[:2], ["p", "q"])


@pytest.mark.parametrize("kind", [FID, CMMD])
def test_nearness_to_a_reference_is_a_reward(kind, tmp_path):
    other = torch.rand(9, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for number, image in enumerate(other):
        Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    by_images, by_features = kind(corners, other), kind(corners, corners(other))
    total = by_features.scores(IMAGES).total
    torch.testing.assert_close(by_images.scores(IMAGES).total, total)
    torch.testing.assert_close(kind(corners, str(tmp_path)).scores(IMAGES).total, total, rtol=0.2, atol=2e-2)
    assert by_features.groupwise
    with pytest.raises(RewardError, match="to be a folder"):
        kind(corners, "nowhere")


def test_set_rewards_mix_with_others():
    made = 2 * FunctionScorer(lambda images: images.mean((1, 2, 3)), "level") + Vendi(corners)
    scores = made.scores(IMAGES, "p")
    torch.testing.assert_close(scores.total, 2 * scores.parts["level"] + scores.parts["vendi(corners)"])
    assert made.groupwise
    assert not made.differentiable


@pytest.mark.skipif(scorer_class("tiny_clip").missing() is not None, reason="tiny_clip has no weights here")
def test_features_of_a_clip_scorer_run_once_with_it():
    reward = load_reward("tiny_clip + 0.1 * vendi(tiny_clip)")
    first, second = reward.leaves()
    tower = first.tower
    assert second.features.scorer.tower is tower
    assert tower.network in reward.networks()  # which say where images go, and what a calibration belongs to
    calls = []
    tower.network.visual.register_forward_hook(lambda *_: calls.append(1))
    assert reward.scores(torch.rand(4, 3, 64, 64), "a red circle").total.shape == (4,)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["tiny_clip", "hub", "inception"])
def test_pictures_follow_an_extractor_to_its_device(kind, tmp_path):
    """An extractor on a CLIP has no weights of its own: pictures must go where its tower is."""
    spec = kind
    if kind == "hub":
        spec = str(tmp_path)
        tiny.hf_clip(tmp_path, words=True)
    if kind == "inception":
        spec = f"inception:{tmp_path / 'weights.pth'}"
        torch.save(Inception().network.state_dict(), tmp_path / "weights.pth")
    picture = Image.new("RGB", (96, 80), "red")
    here = extract_features([picture] * 2, load_features(spec))
    moved = load_features(spec).to("meta")
    there = extract_features([picture] * 2, moved)
    assert (there.device.type, there.shape) == ("meta", here.shape)
    reward = Vendi(spec).to("meta")
    weights = [weight for network in reward.networks() for weight in network.parameters()]
    assert weights
    assert {weight.device.type for weight in weights} == {"meta"}  # where `scores` sends pictures


def test_unknown_features_are_refused():
    with pytest.raises(RewardError, match="has no image features"):
        load_features("verifier")
    with pytest.raises(RewardError, match="Cannot open the features"):
        load_features("no/such-model")
    with pytest.raises(RewardError, match="pytorch-fid"):
        load_features("inception:nowhere.pth")
    assert load_features(corners) is corners


def test_features_of_a_vision_transformer_folder(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    extract = load_features(str(tmp_path))
    picture = Image.fromarray((255 * torch.rand(40, 50, 3)).byte().numpy())
    ours = extract_features(picture, extract)
    with torch.no_grad():
        theirs = model(**processor(picture, return_tensors="pt")).last_hidden_state[:, 0]
    assert ours.shape == (1, 32)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # they round the resized picture to 8 bits
    sizes = [picture, picture.resize((30, 30)), picture]
    assert extract_features(sizes, extract).shape == (3, 32)
    with pytest.raises(RewardError, match="one or more images"):
        extract_features([], extract)


def test_inception_reads_a_weight_file(tmp_path):
    torch.manual_seed(0)
    made = Inception()
    torch.save(made.network.state_dict(), tmp_path / "weights.pth")
    read = load_features(f"inception:{tmp_path / 'weights.pth'}")
    images = torch.rand(2, 3, 80, 80)
    features = extract_features(images, read)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, made(images))
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match="FID's Inception weights"):
        load_features(f"inception:{tmp_path / 'other.pth'}")
    torch.save({"x": Inception}, tmp_path / "code.pth")
    with pytest.raises(RewardError, match="could run code"):
        load_features(f"inception:{tmp_path / 'code.pth'}")
