import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.data.images import (
    ImageError,
    contact_sheet,
    decode_image,
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


def with_exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, suffix, orientation):
    """Stored so that a viewer shows red top left, green top right, blue bottom left."""
    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :12], corners[:8, 12:], corners[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    shown = Image.fromarray(corners)
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    back |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = shown.transpose(Image.Transpose[back[orientation]]) if orientation > 1 else shown
    stored.save(tmp_path / f"a{suffix}", exif=with_exif(orientation), quality=95)
    image, note = decode_image(tmp_path / f"a{suffix}")
    assert image.size == (24, 16)
    assert np.abs(np.asarray(image, int) - corners).mean() < 12
    assert (note is None) == (orientation == 1 or suffix == ".tif")  # Pillow itself turns these


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_orientations_that_are_none_leave_the_picture_as_it_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png", exif=exif)
    assert decode_image(tmp_path / "a.png") == (open_image(tmp_path / "a.png"), None)
    assert open_image(tmp_path / "a.png").size == (6, 4)


def test_cmyk_files_show_their_colours(tmp_path):
    for colour in ((255, 0, 0), (0, 128, 0), (10, 20, 200), (255, 255, 255)):
        Image.new("RGB", (8, 8), colour).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
        Image.new("RGB", (8, 8), colour).convert("CMYK").save(tmp_path / "a.tif")
        with Image.open(tmp_path / "a.jpg") as stored:
            assert stored.mode == "CMYK"
        assert np.abs(np.array(open_image(tmp_path / "a.jpg").getpixel((3, 3))) - colour).max() <= 3
        assert open_image(tmp_path / "a.tif").getpixel((3, 3)) == colour


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_animated_files_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    image, note = decode_image(tmp_path / f"a{suffix}")
    assert image.getpixel((4, 3)) == (255, 0, 0)
    assert note == "first of 3 frames"
    frames[0].save(tmp_path / f"b{suffix}")
    assert decode_image(tmp_path / f"b{suffix}").note is None


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_point_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4), 3).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: expected 8 or 16 bits"):
        open_image(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="8 or 16 bits"):
        to_tensors(Image.new(mode, (4, 4), 3))


def test_sixteen_bit_colour_files(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 40_000, 65_535, 256) * 2  # Pillow itself writes no such file
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert open_image(tmp_path / "a.png").getpixel((1, 0)) == (156, 255, 1)


def test_empty_files_are_image_errors_without_an_address_in_memory(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"Cannot read the image .*a\.jpg: it is empty, or in no format") as error:
        open_image(tmp_path / "a.jpg")
    assert "0x" not in str(error.value)


def test_a_limit_on_pixels_holds_before_the_pixels_are_read(tmp_path):
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:60])  # only the header is whole
    with pytest.raises(ImageError, match="200 x 100 pixels; the limit is 19999"):
        open_image(tmp_path / "a.png", max_pixels=19_999)
    with pytest.raises(ImageError, match="Cannot read"):
        open_image(tmp_path / "a.png", max_pixels=20_000)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif"])
def test_damaged_files_are_pictures_or_image_errors(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a{suffix}"
    frames = [Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)) for _ in range(2)]
    more = {} if suffix in (".jpg", ".bmp") else {"save_all": True, "append_images": frames[1:]}
    frames[0].save(path, **more, **({} if suffix in (".bmp", ".gif") else {"exif": with_exif(6)}))
    content = np.frombuffer(path.read_bytes(), np.uint8)
    seen = set()
    for _ in range(300):
        damaged = content.copy()
        for at in rng.integers(0, len(content), rng.integers(1, 12)):
            damaged[at if rng.random() < 0.5 else at % 200] = rng.integers(256)
        path.write_bytes(damaged[: len(damaged) if rng.random() < 0.7 else rng.integers(len(damaged))].tobytes())
        try:
            seen.add(open_image(path, max_pixels=10_000).mode)
        except ImageError as error:
            seen.add("error" if path.name in str(error) else str(error))
    assert seen == {"RGB", "error"}


@pytest.mark.parametrize(
    "images", [Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 0, 4), torch.zeros(2, 3, 4, 0)]
)
def test_images_without_pixels_are_refused(images):
    with pytest.raises(ValueError, match="images with pixels"):
        to_tensors(images)
    assert len(to_tensors(torch.zeros(0, 3, 4, 4))) == 0
