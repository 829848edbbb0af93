import pytest
import torch

from t2i_align.keys import generator, key


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ((0,), 3581690635855307741),
        ((1,), 7927499134100065532),
        (("1",), 3284777160787797315),
        ((0, "noise", 3), 3598013454707825169),
        (("noise", 0, 3), 5810652343435089012),
        ((7, "scene", "train", "any", 12), 6249651138387222940),
    ],
)
def test_key_values_never_change(parts, value):
    assert key(*parts) == value


def test_key_is_a_valid_seed():
    assert all(0 <= key(n, "x") < 2**63 for n in range(200))


def test_order_and_type_matter():
    assert len({key(1, 2), key(2, 1), key("1", 2), key(1, "2"), key("1", "2"), key(12), key("12"), key("1 2")}) == 8


def test_no_collisions_among_neighbours():
    assert len({key(seed, "noise", step) for seed in range(30) for step in range(30)}) == 900


def test_generator_values_never_change():
    drawn = torch.randint(0, 1_000_000, (3,), generator=generator(0, "noise", 3))
    assert drawn.tolist() == [127049, 552325, 441961]


def test_generators_do_not_depend_on_what_was_drawn_before():
    alone = torch.rand(5, generator=generator(3, "b"))
    first, second = generator(3, "a"), generator(3, "b")
    torch.rand(100, generator=first)
    torch.manual_seed(17)
    torch.rand(100)
    assert torch.equal(torch.rand(5, generator=second), alone)
    assert not torch.equal(torch.rand(5, generator=generator(3, "a")), alone)


def test_generator_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(9, generator=generator(1))
    assert torch.equal(torch.rand(3), expected)
