import pytest
import torch
from sidetask_datasets.columns import Column, pack_depth, pack_normals, unit_


def test_depth_survives_to_the_millimetre_over_the_whole_range():
    metres = torch.tensor([[[0.0, 0.0004, 0.72, 9.999, 32.767, 32.768, 65.535, 70.0]]])
    read = Column(pack_depth(metres), "depth").read(torch.tensor([0]))
    assert read.shape == (1, 1, 1, 8)
    expected = torch.tensor([0.0, 0.0, 0.72, 9.999, 32.767, 32.768, 65.535, 65.535])
    torch.testing.assert_close(read.flatten(), expected)


def test_normals_survive_to_a_hundredth_of_a_degree():
    vectors = unit_(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    vectors[0, :, 0, 0] = 0
    read = Column(pack_normals(vectors), "normals").read(torch.tensor([0, 1]))
    angle = torch.rad2deg(2 * ((read - vectors).norm(dim=1) / 2).asin())
    assert angle.max() < 0.01
    assert read[0, :, 0, 0].tolist() == [0, 0, 0]
    lengths = read.norm(dim=1)
    torch.testing.assert_close(lengths[lengths > 0.5], torch.ones(2 * 256 - 1))


@pytest.mark.parametrize(("kind", "shape"), [("classes", (1, 1, 3)), ("binary", (1, 1, 1, 3))])
def test_the_highest_byte_is_unlabelled(kind, shape):
    read = Column(torch.tensor([[[0, 12, 255]]], dtype=torch.uint8), kind).read(torch.tensor([0]))
    assert read.shape == shape
    assert read.dtype == torch.int64
    assert read.flatten().tolist() == [0, 12, -1]


def test_images_are_standardised():
    column = Column(torch.full((1, 2, 1, 1), 51, dtype=torch.uint8), "image", mean=(0.1, 0.2), std=(0.5, 0.25))
    torch.testing.assert_close(column.read(torch.tensor([0])).flatten(), torch.tensor([0.2, 0.0]))
    plain = Column(column.data, "image").read(torch.tensor([0]))
    torch.testing.assert_close(plain.flatten(), torch.tensor([0.2, 0.2]))


def test_a_tensor_of_another_kind_is_refused():
    with pytest.raises(
        ValueError,
        match=r"a column of depth is stored as torch.int16 or torch.float32 .* found torch.float64 \[1, 2, 2\]",
    ):
        Column(torch.zeros(1, 2, 2, dtype=torch.float64), "depth")
    with pytest.raises(ValueError, match=r"a column's kind is one of image, .* not 'thing'"):
        Column(torch.zeros(1), "thing")


def test_depth_and_disparity_have_the_scale_of_their_column_or_none():
    bits = torch.tensor([[[0, 1, 40000 - 65536]]], dtype=torch.int16)
    read = Column(bits, "disparity", scale=1 / 1024).read(torch.tensor([0]))
    torch.testing.assert_close(read.flatten(), torch.tensor([0.0, 1 / 1024, 40000 / 1024]))
    values = torch.rand(2, 3, 4)
    for kind in ("depth", "disparity"):
        assert torch.equal(Column(values, kind).read(torch.tensor([1])), values[None, 1:])
    assert torch.equal(Column(values[0], "vector").read(torch.tensor([2, 0])), values[0, [2, 0]])
