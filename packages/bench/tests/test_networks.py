import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sidetask_datasets
import torch
from sidetask_bench.networks import deeplabv3, fpn, lenet, mtan, resnet, small, timm, unet, vgg16
from sidetask_bench.networks.resnet import AtrousHead, resnet_stages
from sidetask_core import Batch, Step, Task
from sidetask_saal import SelfAuxiliaries
from torch import nn

pytestmark = pytest.mark.thorough

DENSE = {"segmentation": 13, "depth": 1, "normals": 3}
PAIR = {"depth": 1, "normals": 3}
LABELS = {"left": 10, "right": 10}


def stub(outputs=DENSE, shape=(3, 32, 48), dense=True):
    """What a network reads of a dataset."""
    tasks = tuple(Task(name, loss=lambda p, y: (p - y).square()) for name in outputs)
    views = {name: SimpleNamespace(kind="classes") for name in outputs}
    return SimpleNamespace(name="stub", tasks=tasks, outputs=outputs, views=views, input_shape=shape, dense=dense)


def count(module):
    return sum(p.numel() for p in module.parameters())


def shapes(model, shape, batch=2):
    model.eval()
    with torch.no_grad():
        return {name: tuple(y.shape) for name, y in model(torch.randn(batch, *shape)).items()}


@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 33, 47), (1, 48, 64)])
@pytest.mark.parametrize("cut", [0, 2, None])
def test_small_predicts_at_the_size_of_the_image(shape, cut):
    model = small(stub(shape=shape), cut=cut)
    assert shapes(model, shape) == {name: (2, n, *shape[1:]) for name, n in DENSE.items()}


@pytest.mark.parametrize("cut", range(5))
def test_small_classifies_at_every_cut(cut):
    model = small(stub(LABELS, (1, 36, 36), dense=False), cut=cut)
    assert shapes(model, (1, 36, 36)) == {"left": (2, 10), "right": (2, 10)}


@pytest.mark.parametrize("cut", range(6))
def test_deeplab_predicts_at_the_size_of_the_image_at_every_cut(cut):
    shape = (3, 36, 44)
    model = deeplabv3(stub(PAIR, shape), cut=cut, depth=18)
    assert shapes(model, shape) == {name: (2, n, *shape[1:]) for name, n in PAIR.items()}


@pytest.mark.parametrize("cut", range(4))
def test_unet_predicts_at_the_size_of_the_image_at_every_cut(cut):
    for shape in ((3, 33, 47), (1, 4, 4)):
        model = unet(stub(PAIR, shape), cut=cut, widths=(4, 6, 8))
        assert shapes(model, shape) == {name: (2, n, *shape[1:]) for name, n in PAIR.items()}
        assert len(model.shared) == cut


def test_unet_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="3 stages halve an image of 3×8 too often"):
        unet(stub(PAIR, (3, 3, 8)), widths=(4, 6, 8))
    with pytest.raises(ValueError, match="widths must be positive"):
        unet(stub(PAIR), widths=())
    with pytest.raises(ValueError, match="labels per image"):
        unet(stub(LABELS, (1, 36, 36), dense=False))
    with pytest.raises(ValueError, match=r"cut must be in 0\.\.3"):
        unet(stub(PAIR), widths=(4, 6, 8), cut=4)


@pytest.mark.parametrize("make", [small, lambda data, **options: deeplabv3(data, depth=18, **options)])
def test_cut_moves_parameters_from_shared_to_specific(make):
    data = stub(PAIR, (3, 32, 32))
    whole = sum(p.numel() for p in make(data).restricted_to(["depth"]).parameters())
    shared = []
    for cut in range(5 if make is small else 6):
        model = make(data, cut=cut)
        shared.append(sum(p.numel() for p in model.shared_parameters()))
        own = sum(p.numel() for p in model.specific_parameters("depth"))
        assert shared[-1] + own == whole, "a task's path through the network never changes"
    assert shared[0] == 0
    assert shared == sorted(set(shared))


@pytest.mark.parametrize("make", [small, lambda data, **options: deeplabv3(data, depth=18, **options)])
def test_branches_are_separate_copies_of_one_initialisation(make):
    model = make(stub(PAIR, (3, 32, 32)), cut=1)
    first, second = model.branches["depth"].parameters(), model.branches["normals"].parameters()
    for a, b in zip(first, second, strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_cut_0_shares_nothing():
    model = small(stub(shape=(3, 32, 32)), cut=0)
    owners = [set(map(id, model.specific_parameters(name))) for name in DENSE]
    assert not model.shared_parameters()
    assert sum(map(len, owners)) == len(set.union(*owners)) == len(list(model.parameters()))


@pytest.mark.parametrize("cut", [0, 2, None])
@pytest.mark.parametrize("make", [small, lambda data, **options: deeplabv3(data, depth=18, **options)])
def test_every_parameter_gets_a_gradient(make, cut):
    torch.manual_seed(0)
    data = stub(PAIR, (3, 32, 32))
    step = Step(make(data, cut=cut), data.tasks)
    targets = {name: torch.randn(2, n, 32, 32) for name, n in PAIR.items()}
    step.backward(Batch(torch.randn(2, 3, 32, 32), targets))
    silent = [name for name, p in step.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_small_learns_in_a_few_steps():
    torch.manual_seed(0)
    data = stub({"depth": 1}, (3, 32, 32))
    step = Step(small(data), data.tasks)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    images = nn.functional.interpolate(torch.rand(8, 3, 4, 4), scale_factor=8.0, mode="bilinear")
    batch = Batch(images, {"depth": images.mean(dim=1, keepdim=True)})
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        seen.append(float(step.backward(batch).losses["depth"]))
        optimizer.step()
    assert seen[-1] < 0.05 * seen[0]


def test_small_starts_to_measure_at_the_median_label():
    data = sidetask_datasets.scenes(size=(16, 16), train=20, validation=2, test=2, tasks=["segmentation", "depth"])
    model = small(data, widths=(4, 8))
    labels = data.train[range(16)].targets["depth"]
    bias = model.heads["depth"].predict.bias
    assert bias.item() == labels[labels > 0].median()
    # A copy that is made anew begins there too.
    copies = SelfAuxiliaries(data.tasks, ["depth->segmentation"])(small(data, widths=(4, 8), cut=1), data.tasks)
    anew = copies.heads["depth→segmentation"].predict
    assert anew.bias.item() == bias.item()
    assert not torch.equal(anew.weight, copies.heads["depth"].predict.weight)
    assert not model.heads["segmentation"].predict.bias.any()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"cut": 5}, (3, 32, 32), "cut must be in 0..4"),
        ({"widths": []}, (3, 32, 32), "widths and head_width must be positive"),
        ({}, (3, 12, 32), "12×32 is too small"),
        ({}, (7,), r"images \[C, H, W\], found inputs \[7\]"),
    ],
)
def test_small_says_what_is_wrong(options, shape, message):
    with pytest.raises(ValueError, match=message):
        small(stub(shape=shape), **options)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_has_output_stride_8(depth):
    x = torch.randn(1, 3, 64, 96)
    sizes = []
    with torch.no_grad():
        for stage in resnet_stages(depth):
            x = stage.eval()(x)
            sizes.append(tuple(x.shape[1:]))
    wide = 4 if depth == 50 else 1
    assert sizes == [
        (64, 16, 24), (64 * wide, 16, 24), (128 * wide, 8, 12), (256 * wide, 8, 12), (512 * wide, 8, 12)
    ]  # fmt: skip


def test_resnet50_dilates_as_the_papers_say():
    *_, layer3, layer4 = resnet_stages(50)
    dilations = [[block.conv2.dilation[0] for block in layer] for layer in (layer3, layer4)]
    assert dilations == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]
    strides = {conv.stride for layer in (layer3, layer4) for conv in layer.modules() if isinstance(conv, nn.Conv2d)}
    assert strides == {(1, 1)}


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_features_contain_those_of_the_plain_resnet(depth):
    import torchvision

    torch.manual_seed(0)
    stages = resnet_stages(depth)
    plain = getattr(torchvision.models, f"resnet{depth}")()
    for stage, name in zip(stages[1:], ("layer1", "layer2", "layer3", "layer4"), strict=True):
        getattr(plain, name).load_state_dict(stage.state_dict())
    plain.conv1.load_state_dict(stages[0][0].state_dict())
    plain.bn1.load_state_dict(stages[0][1].state_dict())
    plain = nn.Sequential(*list(plain.children())[:-2]).double().eval()
    dilated = nn.Sequential(*stages).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dilated(x)[..., ::4, ::4], plain(x))


def test_parameter_counts_equal_torchvisions():
    from torchvision.models.segmentation import deeplabv3_resnet50

    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=13)
    ours = deeplabv3(stub({"segmentation": 13}, (3, 32, 32)))
    assert count(ours.shared) == count(theirs.backbone)
    assert count(ours.heads["segmentation"]) == count(theirs.classifier)
    dilations = [m.dilation for m in theirs.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert dilations == [m.dilation for m in ours.shared.modules() if isinstance(m, nn.Conv2d)]


def test_atrous_head_is_torchvisions_without_dropout():
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    theirs = DeepLabHead(8, 3).double().eval()
    ours = AtrousHead(8, 3, (16, 24)).double().eval()
    assert count(ours) == count(theirs)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    assert [conv[0].dilation[0] for conv in list(ours.pyramid.convs)[:4]] == [1, 12, 24, 36]
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    expected = nn.functional.interpolate(theirs(x), size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(x), expected)
    ours.train()
    assert torch.equal(ours(x), ours(x)), "nothing is dropped out"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Puts a file where torch.hub keeps what it has downloaded for a name of torchvision's; downloads nothing."""
    import torchvision

    def refuse(url, *_, **__):
        raise OSError(f"no connection to {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)

    def keep(name, state):
        url = torchvision.models.get_weight(name).url
        path = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return path

    return keep


def saved(model, path):
    """The state of a torchvision model in a file as old as torchvision's, which counts no batches."""
    import torchvision

    state = getattr(torchvision.models, model)().state_dict()
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    return state


def test_weights_come_from_a_local_file(tmp_path):
    state = saved("resnet18", tmp_path / "weights.pt")
    model = deeplabv3(stub(shape=(3, 32, 32)), depth=18, cut=2, weights=tmp_path / "weights.pt")
    assert torch.equal(model.shared[0][0].weight, state["conv1.weight"])
    assert torch.equal(model.branches["depth"][-1][1].conv2.weight, state["layer4.1.conv2.weight"])


def test_weights_of_vgg16_are_those_of_torchvisions_convolutions(tmp_path):
    state = saved("vgg16_bn", tmp_path / "weights.pt")
    model = vgg16(stub(LABELS, (3, 32, 32), dense=False), weights=tmp_path / "weights.pt")
    found = model.shared.state_dict()
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    assert len(found) == len(features)
    for own, (name, value) in zip(found.values(), features.items(), strict=True):
        assert torch.equal(own, value), name
    with pytest.raises(ValueError, match=r"fit this vgg16_bn: 78 of another shape \(features\.0\.weight \[64, 3"):
        vgg16(stub(LABELS, (3, 32, 32), dense=False), width=8, weights=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (deeplabv3, "IMAGENET1K_V1"),
        (fpn, "DEFAULT"),
        (mtan, "DEFAULT"),
        (resnet, "ResNet18_Weights.IMAGENET1K_V1"),
    ],
)
def test_weights_have_torchvisions_names(kept, make, name):
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    kept("ResNet18_Weights.IMAGENET1K_V1", state)
    data = stub(PAIR, (3, 32, 32), dense=make is not resnet)
    shared = make(data, depth=18, weights=name).shared.state_dict()
    last = next(value for key, value in shared.items() if key.endswith("1.conv2.weight") and len(value) == 512)
    assert torch.equal(last, state["layer4.1.conv2.weight"])


def test_weights_by_name_say_what_is_wrong(kept):
    data = stub(PAIR, (3, 32, 32))
    with pytest.raises(ValueError, match=r"no such file, and no name .* resnet50: IMAGENET1K_V1, IMAGENET1K_V2, "):
        deeplabv3(data, weights="IMAGENET_V1")
    with pytest.raises(ValueError, match=r"resnet50-11ad3fa6\.pth nor https.* be read as weights: OSError: no conn"):
        deeplabv3(data, weights="IMAGENET1K_V2")
    # A file of the name that holds something else.
    path = kept("ResNet18_Weights.IMAGENET1K_V1", {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{path}: the weights do not fit this resnet18: 100 missing .* 1 unknown"):
        deeplabv3(data, depth=18, weights="DEFAULT")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"neither {path} nor .* can be read as weights: it is not, or not only, t"):
        deeplabv3(data, depth=18, weights="DEFAULT")


class Runs:
    """What is run where a pickle of it is opened."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", ["junk", "nothing", "a class", "no file"])
def test_files_that_hold_no_weights_are_named(tmp_path, capsys, content):
    path = tmp_path / "weights.pt"
    if content == "a class":
        torch.save({"weight": Runs()}, path)
    elif content != "no file":
        path.write_bytes(b"junk, and more of it" if content == "junk" else b"")
    wrong = "no such file" if content == "no file" else "cannot be read as weights"
    wrong += ": it is not, or not only, tensors" * (content != "no file")
    with pytest.raises(ValueError, match=rf"{path}: {wrong}"):
        deeplabv3(stub(shape=(3, 32, 32)), depth=18, weights=path)
    with pytest.raises(ValueError, match=rf"{path}: {wrong}"):
        vgg16(stub(LABELS, (3, 32, 32), dense=False), weights=str(path))
    assert capsys.readouterr().out == ""


def test_weights_that_do_not_fit_are_named(tmp_path):
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    del state["layer1.0.bn1.bias"]
    state["extra"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "weights.pt")
    data = stub(shape=(3, 32, 32))
    with pytest.raises(ValueError, match="do not fit") as caught:
        deeplabv3(data, depth=18, weights=tmp_path / "weights.pt")
    for part in (
        "layer1.0.bn1.bias",
        "extra",
        "conv1.weight [64, 1, 7, 7] instead of [64, 3, 7, 7]",
    ):
        assert part in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state_dict"):
        deeplabv3(data, depth=18, weights=tmp_path / "list.pt")


def test_deeplab_says_what_is_wrong():
    with pytest.raises(ValueError, match="depth must be one of 18, 50, found 34"):
        deeplabv3(stub(), depth=34)
    with pytest.raises(ValueError, match="labels per image; use small"):
        deeplabv3(stub(LABELS, dense=False))
    with pytest.raises(ValueError, match=r"cut must be in 0\.\.5"):
        deeplabv3(stub(shape=(3, 32, 32)), depth=18, cut=6)


@pytest.mark.parametrize("cut", [0, 3, None])
def test_fpn_predicts_at_the_size_of_the_image(cut):
    shape = (3, 45, 65)
    model = fpn(stub(PAIR, shape), cut=cut, width=16)
    assert shapes(model, shape) == {name: (2, n, *shape[1:]) for name, n in PAIR.items()}
    assert len(model.shared) == (5 if cut is None else cut)


def test_mtan_masks_what_the_trunk_sees():
    shape = (3, 45, 65)
    model = mtan(stub(PAIR, shape), depth=18)
    assert shapes(model, shape) == {name: (2, n, *shape[1:]) for name, n in PAIR.items()}
    attention = model.branches["depth"].eval()
    widths = (64, 128, 256, 512)
    sizes = ((12, 17), (6, 9), (6, 9), (6, 9))
    maps = [
        tuple(torch.rand(1, width, *size) + 0.5 for _ in range(2)) for width, size in zip(widths, sizes, strict=True)
    ]
    attended = attention(maps)
    assert (attended >= 0).all()
    assert (attended <= maps[-1][1]).all(), "a mask is in [0, 1]"
    # The last mask closed, nothing passes, whatever the trunk says.
    norm = attention.masks[-1][2]
    torch.nn.init.constant_(norm.bias, -1e4)
    assert not attention(maps).any()


def test_mtan_carries_attention_on_by_residual_bottlenecks():
    widths = [256, 512, 1024, 2048]
    attention = mtan(stub({"depth": 1}), depth=50).branches["depth"].double().eval()
    # The mask's two 1×1 convolutions and two normalisations; 1×1, 3×3, 1×1 with one each, and the skip's 1×1 with one.
    read = [256, 1024, 2048, 4096]
    assert [count(mask) for mask in attention.masks] == [
        a * b // 4 + b // 4 * b + 2 * (b // 4 + b) for a, b in zip(read, widths, strict=True)
    ]
    assert [count(block) for block in attention.carry] == [
        a * c + 9 * c * c + c * b + a * b + 2 * (c + c + b + b)
        for a, b, c in ((a, b, b // 4) for a, b in itertools.pairwise(widths))
    ]
    # Convolutions that say nothing leave the skip.
    x = torch.randn(2, 256, 4, 5, dtype=torch.float64)
    block = attention.carry[0]
    nn.init.zeros_(block.bn3.weight)
    torch.testing.assert_close(block(x), torch.relu(block.downsample(x)))
    assert block(x).any()


def test_mtan_shares_its_trunk_whole():
    with pytest.raises(ValueError, match="shared whole; found cut 3"):
        mtan(stub(PAIR), cut=3)
    model = mtan(stub(PAIR), depth=18)
    alone = sum(p.numel() for p in resnet_stages_module().parameters())
    assert sum(p.numel() for p in model.shared_parameters()) == alone


def resnet_stages_module():
    return nn.Sequential(*resnet_stages(18))


@pytest.mark.parametrize(
    ("make", "stages"), [(resnet, 5), (vgg16, 5), (lambda data, **options: lenet(data, hidden=7, **options), 3)]
)
def test_classifiers_classify_at_every_cut(make, stages):
    shape = (3, 36, 36)
    for cut in (0, 2, stages, None):
        model = make(stub(LABELS, shape, dense=False), cut=cut)
        assert shapes(model, shape) == {"left": (2, 10), "right": (2, 10)}
        assert len(model.shared) == (stages if cut is None else cut)
    with pytest.raises(ValueError, match="labels per pixel"):
        make(stub(PAIR, shape))


def test_classifiers_are_what_torchvision_and_the_paper_have():
    import torchvision

    plain = torchvision.models.resnet18(num_classes=2).eval()
    model = resnet(stub({"a": 2}, (3, 64, 64), dense=False), hidden=0).eval()
    x = torch.randn(2, 3, 64, 64)
    for stage, names in zip(
        model.shared, (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)), strict=True
    ):
        own = [child for child in stage if any(True for _ in child.parameters())] if len(names) > 1 else [stage]
        for name, child in zip(names, own, strict=True):
            child.load_state_dict(getattr(plain, name).state_dict())
    model.heads["a"][-1].load_state_dict(plain.fc.state_dict())
    torch.testing.assert_close(model(x)["a"], plain(x))
    # 9×9 and 5×5 kernels on 36×36 leave 20 maps of 5×5.
    assert lenet(stub(LABELS, (1, 36, 36), dense=False)).shared[2][1].in_features == 500
    convolutions = [m for m in vgg16(stub(LABELS, (3, 32, 32), dense=False)).shared.modules() if type(m) is nn.Conv2d]
    assert len(convolutions) == 13


def test_timm_gives_an_encoder_by_name(tmp_path):
    from safetensors.torch import save_file

    for model in ("resnet10t", "convnext_atto"):
        dense = timm(stub(PAIR, (1, 64, 96)), model=model, head_width=8)
        assert shapes(dense, (1, 64, 96)) == {name: (2, n, 64, 96) for name, n in PAIR.items()}
    data = stub(LABELS, (3, 64, 64), dense=False)
    whole = timm(data, model="resnet10t", cut=0, hidden=4)
    assert shapes(whole, (3, 64, 64)) == {"left": (2, 10), "right": (2, 10)}
    assert not whole.shared_parameters()
    state = timm(data, model="resnet10t").shared[0].encoder.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        found = timm(data, model="resnet10t", weights=tmp_path / name).shared[0].encoder.state_dict()
        assert all(torch.equal(found[key], value) for key, value in state.items())


def test_timm_names_what_is_wrong(tmp_path):
    data = stub(LABELS, (3, 64, 64), dense=False)
    with pytest.raises(ValueError, match="'resnett'"):
        timm(data, model="resnett")
    with pytest.raises(ValueError, match=r"nothing\.pt: cannot be read as weights"):
        timm(data, weights=tmp_path / "nothing.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: .* tensors of timm's 'resnet10t' are missing"):
        timm(data, model="resnet10t", weights=tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"cut must be in 0\.\.1"):
        timm(data, cut=2)


def domains(names=("a", "b", "c")):
    """A stub whose tasks have inputs of their own."""
    data = stub(dict.fromkeys(names, 5), (3, 32, 32), dense=False)
    data.tasks = tuple(replace(task, input=task.name) for task in data.tasks)
    return data


def test_vgg16_normalises_every_domain_by_itself_and_shares_the_rest():
    data = domains()
    model = vgg16(data, width=4, hidden=8, by_domain=True)
    inputs = {name: torch.randn(6, 3, 32, 32) * 3**i + i for i, name in enumerate("abc")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model(inputs["b"], ["b"])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "running" in name or "num_batches" in name} & {
        name for name in before if ".norms.b." in name
    }
    plain = vgg16(data, width=4, hidden=8)
    convolutions = [m for m in model.shared.modules() if type(m) is nn.Conv2d]
    assert len(convolutions) == 13 == len([m for m in plain.shared.modules() if type(m) is nn.Conv2d])
    # With one domain it is the plain network.
    alone = vgg16(domains("a"), width=4, hidden=8, by_domain=True)
    plain = vgg16(domains("a"), width=4, hidden=8)
    state = {
        name.replace("shared.encoder.", "shared.").replace(".norms.a", ""): v for name, v in alone.state_dict().items()
    }
    plain.load_state_dict(state)
    for mode in (True, False):
        torch.testing.assert_close(
            alone.train(mode)(inputs["a"], ["a"])["a"], plain.train(mode)(inputs["a"], ["a"])["a"], rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="an input is of one domain; tasks a, b are of a, b"):
        model(inputs["a"], ["a", "b"])
    with pytest.raises(ValueError, match="its tasks have their input in common"):
        vgg16(stub(LABELS, (3, 32, 32), dense=False), by_domain=True)


def test_vgg16_of_the_domains_of_cifar100_is_auto_lambdas():
    names = [f"domain_{i}" for i in range(20)]
    model = vgg16(domains(names), by_domain=True)
    # Thirteen 3×3 convolutions with a bias, a scale and a shift of each domain after each, and one linear layer a task.
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(9 * a * b + b for a, b in itertools.pairwise(widths))
    assert count(model.shared) == convolutions + 20 * 2 * sum(widths[1:])
    assert count(model.heads) == 20 * (512 * 5 + 5)
    # The last convolutions see one pixel in sixteen: there is no pooling after them but the mean.
    assert model.shared(torch.randn(1, 3, 32, 32), names[:1]).shape == (1, 512, 2, 2)
    with pytest.raises(ValueError, match="15×32 is too small"):
        vgg16(stub(LABELS, (3, 15, 32), dense=False))


@pytest.mark.parametrize("cut", [0, 2])
def test_vgg16_of_domains_splits_anywhere(cut):
    model = vgg16(domains(), cut=cut, width=4, by_domain=True)
    for name in "abc":
        assert model(torch.randn(2, 3, 32, 32), [name])[name].shape == (2, 5)
    shared = [name for name, _ in model.shared.named_parameters() if ".norms." in name]
    assert len(shared) == (2 * 3 * 4 if cut else 0)  # two stages of two norms, three domains, scale and shift
