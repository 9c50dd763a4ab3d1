"""Methods are found by name in whatever is installed, and what is missing is answered with what to do."""

from importlib.metadata import EntryPoint

import pytest
from sidetask_core import Augment, Equal, Fixed, FrozenHeads, Method, MissingKey, Shaper, Task, Uncertainty, plugins
from sidetask_core.testing import squared, tiny_tasks


def halves(tasks, weight=0.5):
    return Method(encoder=Equal(tasks), decoder=Fixed(tasks, dict.fromkeys((t.name for t in tasks), weight)))


def encoder_only(tasks):
    return Method(encoder=Equal(tasks))


class Copies(Augment):
    def extended(self, tasks):
        return [*tasks, Task("copy", squared, primary=False, target="a")]


def copies(tasks):
    augment = Copies()
    return Method(augment=augment, encoder=Equal(augment.extended(tasks)))


class Follower(Equal):
    followed = ()

    def follow(self, rule):
        self.followed = (rule,)


def follower(tasks, seed=0):
    return Method(encoder=Follower(tasks), decoder=Equal(tasks))


def sure(tasks):
    return Method(encoder=Equal(tasks), decoder=Uncertainty(tasks))


def without_head(tasks, frozen):
    return Method(augment=FrozenHeads([frozen]), encoder=Equal(tasks), decoder=Equal(tasks))


def shaped(tasks):
    return Method(shapers={"a": Shaper(), "b": Shaper()}, encoder=Equal(tasks))


def whole(tasks, weight=0.5):
    rule = Fixed(tasks, dict.fromkeys((t.name for t in tasks), weight))
    return Method(encoder=rule, decoder=rule)


def broken(tasks):
    return "not a method"


class Distribution:
    def __init__(self, name):
        self.name = name
        self.metadata = {"Name": name}


def point(name, value, distribution):
    found = EntryPoint(name, f"{__name__}:{value}", "sidetask.methods")
    vars(found)["dist"] = Distribution(distribution)
    return found


@pytest.fixture
def offers(monkeypatch):
    points = [point("halves", "halves", "mine"), point("plain", "encoder_only", "mine"), point("odd", "broken", "mine")]
    points.append(point("whole", "whole", "mine"))
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "sidetask.methods" else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.value.split(":")[1]])
    return points


def test_what_is_installed(offers):
    assert plugins.installed("methods") == {"halves": "mine", "odd": "mine", "plain": "mine", "whole": "mine"}
    assert plugins.installed("networks") == {}
    assert plugins.find("methods", "halves") is halves


@pytest.mark.parametrize(
    ("group", "name", "distribution"),
    [
        ("methods", "pcgrad", "sidetask-baselines"),
        ("methods", "ial", "sidetask-ial"),
        ("methods", "saal-ew", "sidetask-saal"),
        ("datasets", "scenes", "sidetask-datasets"),
        ("networks", "deeplabv3", "sidetask-bench"),
    ],
)
def test_a_known_name_that_is_not_installed(offers, group, name, distribution):
    with pytest.raises(MissingKey, match=f"'{name}' is not installed; pip install {distribution}$"):
        plugins.find(group, name)


def test_an_unknown_name(offers):
    with pytest.raises(
        MissingKey, match=r"method 'halvs'; did you mean 'halves'. installed are: halves, odd, plain, whole"
    ):
        plugins.find("methods", "halvs")
    with pytest.raises(ValueError, match="the groups are: methods, datasets, networks; not 'optimizers'"):
        plugins.find("optimizers", "sgd")


def test_two_claims_on_one_name(offers):
    offers.append(point("halves", "encoder_only", "theirs"))
    for call in (lambda: plugins.find("methods", "halves"), lambda: plugins.installed("methods")):
        with pytest.raises(ValueError, match=r"method 'halves' is claimed by mine .* and theirs .*; uninstall one"):
            call()


def test_one_distribution_seen_twice_is_one_claim(offers):
    offers.append(point("halves", "halves", "mine"))
    assert plugins.find("methods", "halves") is halves


def test_methods_from_names_options_and_slots(offers):
    tasks = tiny_tasks()
    assert isinstance(plugins.make_method("plain", tasks).encoder, Equal)
    assert plugins.make_method({"name": "halves", "weight": 2.0}, tasks).decoder.weights.tolist() == [2, 2, 2]
    mixed = plugins.make_method({"encoder": "plain", "decoder": {"name": "halves", "weight": 3.0}}, tasks)
    assert isinstance(mixed.encoder, Equal)
    assert mixed.decoder.weights.tolist() == [3, 3, 3]
    assert plugins.make_method({"decoder": "halves"}, tasks).encoder is None


def test_rules_beside_an_augment_weigh_its_tasks_too(offers):
    offers.append(point("copies", "copies", "mine"))
    tasks = tiny_tasks()
    method = plugins.make_method({"decoder": "halves", "encoder": "plain", "augment": "copies"}, tasks)
    assert method.encoder.tasks == method.decoder.tasks == ("a", "b", "c", "copy")
    assert plugins.make_method("copies", tasks).encoder.tasks == ("a", "b", "c", "copy")
    with pytest.raises(
        ValueError, match="encoder 'copies' weighs the tasks a, b, c, copy, but there are a, b, c; name"
    ):
        plugins.make_method({"encoder": "copies", "decoder": "halves"}, tasks)


def test_slots_that_are_given_alike_share_their_rules(offers):
    tasks = tiny_tasks()
    both = plugins.make_method({"encoder": "whole", "decoder": {"name": "whole"}}, tasks)
    assert both.encoder is both.decoder
    other = plugins.make_method({"encoder": "whole", "decoder": {"name": "whole", "weight": 2.0}}, tasks)
    assert other.encoder is not other.decoder


def test_what_no_slot_takes_is_not_dropped(offers):
    tasks = tiny_tasks()
    offers += [point("without-head", "without_head", "mine"), point("shaped", "shaped", "mine")]
    frozen = {"name": "without-head", "frozen": "c"}
    for spec in ({"encoder": frozen}, {"decoder": frozen, "encoder": "plain"}, {"encoder": frozen, "decoder": frozen}):
        with pytest.raises(ValueError, match=r"'without-head'.* has something for the slot augment, which is lost in"):
            plugins.make_method(spec, tasks)
    with pytest.raises(ValueError, match=r"'shaped'.* for the slot shapers, which is lost in the slot encoder alone;"):
        plugins.make_method({"encoder": "shaped"}, tasks)
    method = plugins.make_method({"augment": frozen, "encoder": frozen, "decoder": "halves"}, tasks)
    assert method.augment.names == ("c",)
    method = plugins.make_method({"shapers": {"a": "shaped"}, "encoder": "shaped"}, tasks)
    assert list(method.shapers) == ["a"]


def test_an_encoder_follows_the_decoders_uncertainty(offers):
    tasks = tiny_tasks()
    offers += [point("follower", "follower", "mine"), point("sure", "sure", "mine")]
    both = plugins.make_method({"encoder": {"name": "follower", "seed": 1}, "decoder": "sure"}, tasks)
    assert both.encoder.followed == (both.decoder,)
    assert plugins.make_method({"decoder": "sure", "encoder": "follower"}, tasks).encoder.followed
    assert not plugins.make_method({"encoder": "follower", "decoder": "halves"}, tasks).encoder.followed
    assert not plugins.make_method("follower", tasks).encoder.followed


def test_specs_that_cannot_be_built(offers):
    tasks = tiny_tasks()
    with pytest.raises(TypeError, match=r"method 'halves': .*'wait'.* its options are: weight"):
        plugins.make_method({"name": "halves", "wait": 1}, tasks)
    with pytest.raises(TypeError, match=r"'weigth'; did you mean 'weight'\? its options are: weight"):
        plugins.make_method({"name": "halves", "weigth": 1}, tasks)
    with pytest.raises(TypeError, match=r"no slot 'decodr'; did you mean 'decoder'\?"):
        plugins.make_method({"decodr": "halves"}, tasks)
    with pytest.raises(TypeError, match="'odd' returned str, expected a Method"):
        plugins.make_method("odd", tasks)
    with pytest.raises(MissingKey, match="method 'plain' leaves the slot decoder empty"):
        plugins.make_method({"decoder": "plain"}, tasks)
    with pytest.raises(MissingKey, match="method 'plain' leaves the slot shapers of task 'a' empty"):
        plugins.make_method({"shapers": {"a": "plain"}}, tasks)
    with pytest.raises(TypeError, match="shapers map a task's name to a method, not 'plain'"):
        plugins.make_method({"shapers": "plain"}, tasks)
    with pytest.raises(TypeError, match="not 5"):
        plugins.make_method(5, tasks)
