import numpy
import pytest
import torch
from sidetask_datasets import View, gallery, palette


def test_a_target_and_a_certain_prediction_look_alike():
    view = View("classes", classes=("a", "b", "c"))
    target = torch.tensor([[0, 1], [2, 0]])
    logits = torch.nn.functional.one_hot(target, 3).permute(2, 0, 1).float()
    assert (view.image(target) == view.image(logits)).all()
    edges = View("binary")
    truth = torch.tensor([[[0, 1, -1]]])
    assert (edges.image(truth) == edges.image(torch.tensor([[[-99.0, 99.0, -99.0]]]))).all()
    assert edges.image(truth)[0, :, 0].tolist() == [0, 255, 0]
    label = View("label", classes=("a", "b"))
    assert (label.image(torch.tensor(1)) == label.image(torch.tensor([0.0, 2.0]))).all()
    assert (label.image(torch.tensor(1)) != label.image(torch.tensor(0))).any()
    assert label.image(torch.tensor(-1)).shape == (36, 36, 3)


def test_normals_are_drawn_by_direction_whatever_their_length():
    towards, up = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([0.0, -2.0, 0.0])
    picture = View("normals").image(torch.stack([towards, up, torch.zeros(3)], dim=1)[:, None])
    assert picture.tolist() == [[[128, 128, 255], [128, 255, 128], [0, 0, 0]]]


def test_near_is_brighter_than_far_and_unlabelled_is_black():
    picture = View("scalar", limits=(1.0, 5.0)).image(torch.tensor([[[0.5, 1.0, 2.5, 5.0, 9.0, 0.0]]]))
    light = picture[0].sum(axis=1).tolist()
    assert light[0] == light[1] > light[2] > light[3] == light[4] > light[5] == 0


def test_photographs_lose_their_standardisation():
    view = View("image", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert view.image(torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]
    assert View("image", mean=(0.5,), std=(0.5,)).image(torch.ones(1, 1, 1)).tolist() == [[[255, 255, 255]]]


def test_drawing_needs_no_gradient():
    assert View("scalar").image(torch.rand(1, 2, 2, requires_grad=True)).dtype == numpy.uint8


def test_wrong_views_and_tensors_are_refused():
    with pytest.raises(ValueError, match="not 'heat'"):
        View("heat")
    with pytest.raises(ValueError, match="2 classes need as many colours, found 1"):
        View("classes", classes=("a", "b"), colours=((0, 0, 0),))
    with pytest.raises(ValueError, match=r"a view of classes draws 2 or 3 dimensions, found \[1, 1, 2, 2\]"):
        View("classes", classes=("a",)).image(torch.zeros(1, 1, 2, 2))


def test_colours_are_apart():
    colours = torch.tensor(palette(20)).float()
    distance = torch.cdist(colours, colours) + 1e3 * torch.eye(20)
    assert distance.min() > 20


def test_a_gallery_lines_up_pictures():
    black, grey = numpy.zeros((2, 3, 3), numpy.uint8), numpy.full((1, 2, 3), 9, numpy.uint8)
    sheet = gallery([[black, grey], [grey]], gap=1, zoom=2)
    assert sheet.shape == (2 * (2 + 1 + 1), 2 * (3 + 1 + 2), 3)
    assert (sheet[0:4, 0:6] == 0).all()
    assert (sheet[0:2, 8:12] == 9).all()
    assert (sheet[6:8, 0:4] == 9).all()
    assert (sheet[4:6] == 255).all()
