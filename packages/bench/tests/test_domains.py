"""Tasks with inputs of their own, from the data to the picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sidetask_bench import ExperimentError, evaluate, gallery, label, records, train
from sidetask_bench.breakdown import Breakdown
from sidetask_bench.networks import small
from sidetask_bench.run import load_run
from sidetask_bench.trainer import Trainer
from sidetask_core import plugins
from sidetask_datasets import JoinedSplit, digits

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")
SIZES = {"north": 24, "south": 16}


def domains():
    """Digits of the one corner and of the other, in images that have nothing to do with each other."""
    found = {}
    for seed, (name, count) in enumerate(SIZES.items()):
        data = digits(train=count, validation=count // 2, test=count // 4 + 1, seed=seed, tasks=["top_left"])
        for split in ("train", "validation", "test"):
            part = getattr(data, split)
            part.targets[name] = part.targets.pop("top_left")
        found[name] = data
    splits = {
        split: JoinedSplit({name: getattr(data, split) for name, data in found.items()})
        for split in ("train", "validation", "test")
    }
    one = found["north"]
    return replace(
        one,
        name="domains",
        tasks=tuple(replace(one.tasks[0], name=name, input=name) for name in SIZES),
        outputs=dict.fromkeys(SIZES, 10),
        views=dict.fromkeys(SIZES, one.views["top_left"]),
        **splits,
    )


@pytest.fixture
def config(load, monkeypatch):
    find = plugins.find

    def found(group, name):
        return domains if (group, name) == ("datasets", "domains") else find(group, name)

    monkeypatch.setattr(plugins, "find", found)
    changes = [
        "dataset={name: domains}",
        "training.epochs=2",
        "training.batch_size=8",
        "rows={single: {network: {cut: 0}}, equal: {}}",
    ]

    def build(*more):
        return load(*changes, *more).run("equal", 0)

    return build


def test_domains_are_trained_tested_and_drawn(config, tmp_path):
    result = train(config(), tmp_path / "equal")
    assert result["steps"] == 2 * 3
    _, data, model = load_run(tmp_path / "equal")
    assert result["test"] == evaluate(model, data.tasks, data.test, 3)
    for task in data.tasks:
        # As if there was this domain alone.
        part = data.test.parts[task.name]
        alone = evaluate(model, [replace(task, input=None)], part, 5)
        assert alone[task.name]["accuracy"] == pytest.approx(result["test"][task.name]["accuracy"], abs=1e-7)
    row = {"name": "equal", "runs": [{"seed": 0, "folder": "equal"}], "mean": {}, "std": {}, "improvement": {}}
    row["improvement"] = {"mean": 0, "std": None, "values": [0]}
    written = {"baseline": "equal", "improvement": "flat", "tasks": [], "rows": [row]}
    (tmp_path / "comparison.json").write_text(json.dumps(written))
    strips = gallery.collect(records.load(tmp_path), samples=7).strips
    # The south has five test images.
    assert [(strip.task, strip.sample) for strip in strips] == [
        (n, i) for n, c in ((("north"), 7), ("south", 5)) for i in range(c)
    ]
    south = data.test.parts["south"][2]
    assert (strips[9].pictures[0].pixels == data.show_input(south.inputs[0])).all()


def test_one_domain_learns_what_a_network_says_of_its_images(config, tmp_path):
    train(config(), tmp_path / "equal")
    label(tmp_path / "equal", tmp_path / "labels", task="north", domain="south", kind="soft")
    _, data, model = load_run(tmp_path / "equal")
    said = model(data.validation.parts["south"][:].inputs, tasks=["north"])["north"].softmax(dim=1)
    with np.load(tmp_path / "labels/validation.npz", allow_pickle=False) as archive:
        np.testing.assert_allclose(archive["labels"], said.detach().numpy(), atol=2e-3)
    labels = f"dataset={{name: pseudo, of: {{name: domains}}, labels: {{guess: {tmp_path / 'labels'}}}}}"
    result = train(config(labels), tmp_path / "student")
    assert set(result["test"]) == {*SIZES, "guess"}
    _, data, _ = load_run(tmp_path / "student")
    assert [task.input for task in data.tasks] == ["north", "south", "south"]


@pytest.mark.parametrize(
    ("domain", "message"),
    [(None, "at least one domain is needed; there are: north, south"), ("west", "unknown domain 'west'; there are")],
)
def test_labels_need_a_domain_that_is_there(config, tmp_path, domain, message):
    train(config(), tmp_path / "equal")
    with pytest.raises(ExperimentError, match=message):
        label(tmp_path / "equal", tmp_path / "labels", task="north", domain=domain, kind="soft")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("method", ["equal", "uncertainty"])
def test_a_trainer_of_domains_goes_on_as_if_never_stopped(config, method):
    run, data = config(f"method={method}"), domains()
    one, other = Trainer(run, data, CPU), Trainer(run, data, CPU)
    for trainer in (one, other):
        steps = trainer.steps()
        next(steps)
        if trainer is other:
            state = trainer.state()
            other = Trainer(run, data, CPU)
            other.load_state(state)
            steps = other.steps()
        assert len(list(steps)) == 2
    for a, b in zip(one.step.parameters(), other.step.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_small_network_reads_every_domain():
    data = domains()
    model = small(data, widths=(4, 8))
    batch = data.train[:2]
    for task in data.tasks:
        assert model(batch.input_of(task), tasks=[task.name])[task.name].shape == (2, 10)


def test_labels_of_other_images_break_nothing_down():
    with pytest.raises(ExperimentError, match="task 'south' does not label the inputs of task 'north'"):
        Breakdown(by="south").classes(domains(), "north")
