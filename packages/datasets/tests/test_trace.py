"""Ray casting against geometry worked out on paper."""

import math

import pytest
import torch
from sidetask_datasets.scenes.render import render
from sidetask_datasets.scenes.trace import blocked, trace
from sidetask_datasets.scenes.world import CLASSES, PANELS, PARTS, Camera, Scene, Shapes

LOW, HIGH = (-3.0, -1.5, -1.0), (3.0, 1.5, 6.0)


def shapes(*rows, yaw=0.0):
    """Shapes of one scene from rows of centre and half sizes."""
    if not rows:
        return Shapes.none()
    table = torch.tensor([rows])
    return Shapes(table[..., :3], table[..., 3:], torch.tensor([[yaw]]), (0,) * len(rows))


def make_scene(boxes=None, cylinders=None, spheres=None, panels=None, rug=(0.0, 0.0, 0.0, 0.0, 0.0)):
    boxes, cylinders, spheres = (kind or Shapes.none() for kind in (boxes, cylinders, spheres))
    panels = torch.zeros(1, 0, 5) if panels is None else torch.tensor([panels])
    names = ["floor", "ceiling", "wall", "wall", "wall", "wall", "rug"] + ["window"] * panels.shape[1]
    names += ["cabinet"] * boxes.half.shape[1] + ["pillar"] * cylinders.half.shape[1] + ["ball"] * spheres.half.shape[1]
    return Scene(
        room=torch.tensor([[LOW, HIGH]]),
        boxes=boxes,
        cylinders=cylinders,
        spheres=spheres,
        rug=torch.tensor([rug]),
        panels=panels,
        labels=torch.tensor([[CLASSES.index(name) for name in names]]),
        legs=torch.zeros(1, len(names), dtype=torch.bool),
        materials=torch.full((1, len(names), 10), 0.5) * torch.tensor([1.0] * 6 + [0.0] * 4),
        light=torch.tensor([[0.0, -1.3, 2.0, 1.0, 1.0, 1.0, 0.3]]),
    )


def make_camera(size=(33, 45), focal=40.0, yaw=0.0, pitch=0.0, position=(0.0, 0.0, 0.0)):
    return Camera(
        torch.tensor([position]),
        torch.tensor([yaw]),
        torch.tensor([pitch]),
        torch.tensor([focal]),
        torch.tensor([[size[1] / 2, size[0] / 2]]),
        size,
    )


def in_camera(camera, point):
    """A world point in camera axes."""
    return (torch.tensor(point) - camera.position[0]) @ camera.rotation()[0]


POSES = [(0.0, 0.0), (0.3, 0.2), (-0.4, -0.1)]


@pytest.mark.parametrize(("yaw", "pitch"), POSES)
def test_a_sphere_has_its_depth_and_normals(yaw, pitch):
    centre, radius = (0.2, 0.1, 3.0), 0.8
    camera = make_camera(yaw=yaw, pitch=pitch)
    _, labels = render(make_scene(spheres=shapes((*centre, radius, radius, radius))), camera)
    rays = camera.rays()[0].double()
    middle = in_camera(camera, centre).double()
    a, b, c = rays.square().sum(-1), rays @ middle, middle.square().sum() - radius**2
    root = b.square() - a * c
    hit = (root > 1e-3).view(camera.size)
    assert hit.sum() > 50
    assert (labels.segmentation[0][hit] == CLASSES.index("ball")).all()
    assert (labels.segmentation[0][(root < -1e-3).view(camera.size)] != CLASSES.index("ball")).all()
    depth = ((b - root.clamp(min=0).sqrt()) / a).view(camera.size)
    torch.testing.assert_close(labels.depth[0][hit].double(), depth[hit], rtol=0, atol=1e-4)
    normals = ((depth.view(-1, 1) * rays - middle) / radius).T.view(3, *camera.size)
    torch.testing.assert_close(labels.normals[0][:, hit].double(), normals[:, hit], rtol=0, atol=1e-3)
    upper = (normals.permute(1, 2, 0) @ camera.rotation()[0].T.double())[..., 1] < 0
    parts = labels.parts[0][hit]
    assert ((parts == PARTS.index("sphere upper")) == upper[hit]).float().mean() > 0.98


@pytest.mark.parametrize(("yaw", "pitch"), POSES)
def test_walls_floor_and_ceiling_satisfy_their_planes(yaw, pitch):
    camera = make_camera(yaw=yaw, pitch=pitch, focal=22.0)
    _, labels = render(make_scene(), camera)
    points = (labels.depth[0].flatten()[:, None] * camera.rays()[0]) @ camera.rotation()[0].T + camera.position[0]
    found = labels.segmentation[0].flatten()
    normals = labels.normals[0].flatten(1).T @ camera.rotation()[0].T
    for name, side, sign in (("floor", HIGH, -1.0), ("ceiling", LOW, 1.0)):
        here = found == CLASSES.index(name)
        assert here.any()
        torch.testing.assert_close(points[here, 1], torch.full((int(here.sum()),), side[1]), rtol=0, atol=1e-4)
        expected = torch.tensor([0.0, sign, 0.0]).expand(int(here.sum()), -1)
        torch.testing.assert_close(normals[here], expected, rtol=0, atol=1e-6)
    wall = found == CLASSES.index("wall")
    gaps = torch.stack([points[:, axis] - side[axis] for axis in (0, 2) for side in (LOW, HIGH)]).abs()
    assert gaps.amin(0)[wall].max() < 1e-4
    assert (points >= torch.tensor(LOW) - 1e-4).all()
    assert (points <= torch.tensor(HIGH) + 1e-4).all()


def test_a_box_turned_by_45_degrees_shows_its_edge():
    half = 0.5
    scene = make_scene(boxes=shapes((0.0, 0.0, 3.0, half, 0.6, half), yaw=math.pi / 4))
    _, labels = render(scene, make_camera(size=(3, 101), focal=100.0))
    middle = labels.depth[0, 1]
    x = torch.arange(101) + 0.5 - 50.5
    # Its sides are the planes z = 3 − half·√2 + |x|, seen along x = z · column / focal.
    expected = (3 - half * math.sqrt(2)) / (1 - x.abs() / 100)
    on = labels.segmentation[0, 1] == CLASSES.index("cabinet")
    torch.testing.assert_close(middle[on], expected[on], rtol=1e-4, atol=1e-4)
    normals = labels.normals[0, :, 1]
    diagonal = math.sqrt(0.5)
    torch.testing.assert_close(normals[:, 60], torch.tensor([diagonal, 0.0, -diagonal]))
    torch.testing.assert_close(normals[:, 40], torch.tensor([-diagonal, 0.0, -diagonal]))
    assert {PARTS[i] for i in labels.parts[0, 1][on]} == {"box front", "box side"}


def test_a_yaw_turns_from_z_towards_x():
    """The front of a box, its local −z, turned by 90° looks along −x."""
    boxes = shapes((0.0, 0.0, 3.0, 0.5, 0.5, 0.5), yaw=math.pi / 2)
    left = make_camera(yaw=math.pi / 2, position=(-2.0, 0.0, 3.0))
    _, labels = render(make_scene(boxes=boxes), left)
    assert PARTS[labels.parts[0, 16, 22]] == "box front"
    _, labels = render(make_scene(boxes=boxes), make_camera())
    assert PARTS[labels.parts[0, 16, 22]] == "box side"


def test_a_cylinder_has_a_cap_and_a_side():
    cylinders = shapes((0.0, 1.0, 3.0, 0.6, 0.3, 0.6))
    camera = make_camera()
    _, labels = render(make_scene(cylinders=cylinders), camera)
    points = labels.depth[0].flatten()[:, None] * camera.rays()[0]
    parts = labels.parts[0].flatten()
    cap, side = parts == PARTS.index("cylinder cap"), parts == PARTS.index("cylinder side")
    assert cap.sum() > 20
    assert side.sum() > 20
    torch.testing.assert_close(points[cap, 1], torch.full((int(cap.sum()),), 0.7), rtol=0, atol=1e-4)
    around = (points[side, 0].square() + (points[side, 2] - 3).square()).sqrt()
    torch.testing.assert_close(around, torch.full_like(around, 0.6), rtol=0, atol=1e-4)
    normals = labels.normals[0].flatten(1).T
    assert (normals[cap] == torch.tensor([0.0, -1.0, 0.0])).all()
    radial = (points[side] - torch.tensor([0.0, 0.0, 3.0])) * torch.tensor([1.0, 0.0, 1.0]) / 0.6
    torch.testing.assert_close(normals[side], radial, rtol=0, atol=1e-3)


def test_what_is_nearer_hides_what_is_farther_whatever_their_order():
    near, far = (0.0, 0.0, 2.0, 0.4, 0.4, 0.4), (0.0, 0.0, 4.0, 1.0, 1.0, 0.4)
    camera = make_camera()
    one, other = (render(make_scene(boxes=shapes(*rows)), camera)[1] for rows in ((near, far), (far, near)))
    assert torch.equal(one.depth, other.depth)
    assert one.depth[0, 16, 22].item() == pytest.approx(1.6)


def test_absent_shapes_are_never_met():
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(40, 3, generator=generator) * 2 + torch.tensor([-1.0, -1.0, 2.0])
    rows = [(*place, 0.0, 0.0, 0.0) for place in places.tolist()]
    camera = make_camera(size=(65, 65))
    # Rays straight at the centres, where rounding is most likely to meet nothing.
    scene = make_scene(boxes=shapes(*rows), cylinders=shapes(*rows), spheres=shapes(*rows))
    hits = trace(scene, camera.position[:, None], torch.cat([places[None], camera.rays()], dim=1))
    assert (hits.surface < PANELS).all()
    assert not blocked(scene, torch.zeros(1, 40, 3), 2 * places[None]).any()


def test_shadows_fall_between_a_point_and_the_light():
    scene = make_scene(spheres=shapes((0.0, 0.0, 2.0, 0.5, 0.5, 0.5)))
    origin = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]])
    direction = torch.tensor([[[0.0, 0.0, 4.0], [0.0, 0.0, 1.4], [0.0, 0.0, -4.0], [0.0, -2.0, 0.0]]])
    assert blocked(scene, origin, direction).tolist() == [[True, False, False, True]]
    image, _ = render(make_scene(boxes=shapes((0.0, 0.3, 2.0, 0.5, 0.05, 0.5))), make_camera(pitch=0.6))
    plain, _ = render(make_scene(), make_camera(pitch=0.6))
    assert (image < plain - 0.1).any()


def test_panels_and_rugs_lie_flat():
    panel = (4, 0.5, -0.2, 0.6, 0.4)
    scene = make_scene(panels=[panel], rug=(0.0, 4.0, 1.0, 0.5, 0.0))
    camera = make_camera(pitch=0.1)
    _, labels = render(scene, camera)
    bare = render(make_scene(), camera)[1]
    assert torch.equal(labels.depth, bare.depth)
    assert torch.equal(labels.normals, bare.normals)
    points = (labels.depth[0].flatten()[:, None] * camera.rays()[0]) @ camera.rotation()[0].T
    found, parts = labels.segmentation[0].flatten(), labels.parts[0].flatten()
    window = found == CLASSES.index("window")
    inside = ((points - torch.tensor([0.5, -0.2, 6.0])).abs() < torch.tensor([0.6, 0.4, 1e-3])).all(1)
    assert window.any()
    assert torch.equal(window, inside)
    assert {PARTS[i] for i in parts[window]} == {"frame", "pane"}
    rug = found == CLASSES.index("rug")
    assert rug.any()
    assert torch.equal(rug, ((points - torch.tensor([0.0, 1.5, 4.0])).abs() < torch.tensor([1.0, 1e-3, 0.5])).all(1))


def test_cameras_and_scenes_come_in_pairs():
    with pytest.raises(ValueError, match="1 scenes need as many cameras, found 0"):
        render(make_scene(), make_camera()[:0])
    with pytest.raises(ValueError, match="samples is at least 1, found 0"):
        render(make_scene(), make_camera(), samples=0)
