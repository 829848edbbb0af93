import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.data.images import (
    ImageError,
    contact_sheet,
    find_images,
    open_image,
    pil_to_tensor,
    tensor_to_pil,
    to_rgb,
    to_tensors,
    to_uint8,
)


def colour_of(image):
    """The one colour of an image, as a viewer would show it."""
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.size == image.size
    (colour,) = {tuple(pixel) for pixel in np.asarray(rgb).reshape(-1, 3).tolist()}
    return colour


def half_transparent_palette():
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.info["transparency"] = bytes([255, 128])
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGB", (5, 3), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (5, 3), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (5, 3), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (5, 3), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("L", (5, 3), 77), (77, 77, 77)),
        (Image.new("LA", (5, 3), (77, 255)), (77, 77, 77)),
        (Image.new("LA", (5, 3), (77, 0)), (255, 255, 255)),
        (Image.new("1", (5, 3), 1), (255, 255, 255)),
        (half_transparent_palette(), (255, 127, 127)),
        (Image.new("CMYK", (5, 3), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((3, 5), 40_000, np.uint16)), (156, 156, 156)),
        (Image.fromarray(np.full((3, 5), 65_535, np.uint16)), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_what_a_viewer_shows(image, colour):
    assert colour_of(image) == colour


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_of_a_png_is_laid_on_white(tmp_path, mode):
    image = Image.new(mode, (5, 3), (9, 9, 9) if mode == "RGB" else 1)
    if mode == "P":
        image.putpalette([0, 0, 255, 255, 0, 0])
    transparent = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=transparent)
    with Image.open(tmp_path / "a.png") as read:
        assert read.mode == mode
        assert "transparency" in read.info
    assert colour_of(open_image(tmp_path / "a.png")) == (255, 255, 255)


def test_palette_file_without_transparency(tmp_path):
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.save(tmp_path / "a.gif")
    image.save(tmp_path / "a.png")
    assert colour_of(open_image(tmp_path / "a.png")) == colour_of(open_image(tmp_path / "a.gif")) == (255, 0, 0)


def test_sixteen_bit_files(tmp_path):
    Image.fromarray(np.full((3, 5), 40_000, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((3, 5), 40_000, np.uint16)).save(tmp_path / "a.tiff")
    assert colour_of(open_image(tmp_path / "a.png")) == colour_of(open_image(tmp_path / "a.tiff")) == (156, 156, 156)


def test_the_image_stays_usable_after_the_file_is_closed(tmp_path):
    Image.new("RGB", (5, 3), (1, 2, 3)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert colour_of(image) == (1, 2, 3)


def gradient(width=40, height=24):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], 2).astype(np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif"])
def test_truncated_files_are_image_errors(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    image.save(path)
    assert open_image(path).size == (64, 48)
    content = path.read_bytes()
    for share in (0, 0.02, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError, match=path.name):
            open_image(path)


def test_missing_files_folders_and_texts_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match=r"No such image: .*none\.png"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Cannot read"):
        open_image(tmp_path)
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ImageError, match="Cannot read"):
        open_image(tmp_path / "a.png")


def test_too_large_images_are_image_errors(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bomb\.png"):
        open_image(tmp_path / "bomb.png")


def test_pil_and_tensor_round_trip_is_exact():
    image = gradient()
    tensor = pil_to_tensor(image)
    assert tensor.shape == (3, 24, 40)
    assert tensor.dtype == torch.float32
    assert tensor[0, 5, 30] == 180 / 255
    assert np.array_equal(np.asarray(tensor_to_pil(tensor)), np.asarray(image))


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 1.5])
    levels = to_uint8(values.expand(1, 3, 1, 7))
    assert levels.shape == (1, 1, 7, 3)
    assert levels[0, 0, :, 1].tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_all_kinds_of_one_image_agree(tmp_path):
    image = gradient()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    expected = pil_to_tensor(image)[None]
    for same in (
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        array,
        expected,
        expected[0],
        expected[0].numpy(),
        [image],
        (array,),
        array[None],
        expected.numpy(),
        np.concatenate([array, np.full_like(array[..., :1], 255)], 2),
    ):
        assert torch.equal(to_tensors(same), expected)


def test_gray_arrays_are_images():
    assert torch.equal(to_tensors(np.full((4, 6), 51, np.uint8)), torch.full((1, 3, 4, 6), 0.2))


def test_one_size_gives_a_tensor_and_several_a_list():
    same = to_tensors([gradient(), np.zeros((24, 40, 3), np.uint8)])
    assert same.shape == (2, 3, 24, 40)
    mixed = to_tensors([gradient(), gradient(10, 30), torch.zeros(3, 24, 40)])
    assert [tuple(image.shape) for image in mixed] == [(3, 24, 40), (3, 30, 10), (3, 24, 40)]


def test_a_batch_keeps_its_graph():
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    assert to_tensors(images) is images
    to_tensors([images[0], images[1]]).sum().backward()
    assert images.grad.sum() == images.numel()


@pytest.mark.parametrize(
    "image",
    [
        torch.tensor([-1.0, 1.0]).repeat(48).reshape(2, 3, 4, 4),
        torch.full((2, 3, 4, 4), 255.0),
        torch.full((3, 4, 4), 1.02),
        torch.full((3, 4, 4), -0.02),
        torch.full((3, 4, 4), float("nan")),
        np.full((3, 4, 4), 200.0),
    ],
    ids=["-1 to 1", "0 to 255", "above", "below", "nan", "array"],
)
def test_pixels_outside_zero_to_one_are_refused(image):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        to_tensors(image)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        to_tensors(list(image) if image.ndim == 4 else [image])


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 4, 4),
        torch.zeros(4, 4),
        torch.zeros(2, 4, 4, 3),
        torch.zeros(1, 2, 3, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        np.zeros((4, 4, 3)),
    ],
    ids=lambda image: f"{image.dtype} {tuple(image.shape)}",
)
def test_tensors_of_other_shapes_are_refused(image):
    with pytest.raises(ValueError, match=r"Expected a float tensor \(B, 3, H, W\)"):
        to_tensors(image)


@pytest.mark.parametrize("image", [None, 5, b"bytes", {"a": 1}, [None], [3.5]])
def test_things_that_are_no_images_are_type_errors(image):
    with pytest.raises(TypeError):
        to_tensors(image)


def test_rounding_errors_at_the_edges_pass():
    assert to_tensors(torch.tensor([-0.005, 1.005]).repeat(24).reshape(3, 4, 4)).shape == (1, 3, 4, 4)


def test_find_images_is_sorted_recursive_and_ignores_the_rest(tmp_path):
    (tmp_path / "sub.png").mkdir()
    for name in ("b.png", "a.JPG", "sub.png/c.webp", "notes.txt", "d"):
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["a.JPG", "b.png", "sub.png/c.webp"]


def test_contact_sheet_size_and_places():
    images = [Image.new("RGB", (10, 6), (n, 0, 0)) for n in range(5)]
    sheet = contact_sheet(images, columns=3, gap=2)
    assert sheet.size == (34, 14)
    assert [sheet.getpixel((x, y))[0] for y in (0, 8) for x in (0, 12, 24)] == [0, 1, 2, 3, 4, 255]
    assert sheet.getpixel((10, 0)) == sheet.getpixel((24, 8)) == sheet.getpixel((0, 6)) == (255, 255, 255)


def test_contact_sheet_zoom():
    sheet = contact_sheet([Image.new("RGB", (10, 6))] * 4, columns=2, gap=1, zoom=3)
    assert sheet.size == (61, 37)
    assert sheet.getpixel((29, 17)) == (0, 0, 0)
    assert sheet.getpixel((30, 17)) == (255, 255, 255)
