"""Products that a step has computed are not computed once more, and what is made of them is what it was."""

import copy
import itertools

import pytest
import torch
from sidetask_core import Batch, Method, Shaper, SplitModel, Step, Task, Weighting, passes, products
from sidetask_core.testing import close
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode


class Asking(Shaper):
    """One question to the signals in every step."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.found = ask, []

    def forward(self, losses, target):
        return torch.ones_like(losses)

    def update(self, signals):
        found = self.ask(signals)
        self.found.append(None if found is None else found.slopes)


ASK = {
    "ahead": lambda signals: signals.lookahead_elements("b"),
    "back": lambda signals: signals.hindsight_elements("b"),
}


class Encoder(nn.Module):
    """Every kind of product, some of which are written over, or have a factor that is constant."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=False)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.shift = nn.Conv2d(4, 4, 1)
        self.shift.weight.requires_grad_(False)
        self.line = nn.Conv1d(4, 3, 3)

    def forward(self, x):
        x = functional.relu(self.first(x), inplace=True)
        x = self.up(self.norm(x)).tanh()
        x = self.frozen(x) + self.shift(torch.ones_like(x))
        with torch.no_grad():
            gate = functional.linear(x, torch.eye(x.shape[-1], dtype=x.dtype)).sigmoid()
        return self.line((gate * x).flatten(2))


class Head(nn.Module):
    """A linear layer called by keywords, twice with the same weight."""

    def __init__(self, size):
        super().__init__()
        self.lin = nn.Linear(size, size)

    def forward(self, x):
        x = functional.linear(weight=self.lin.weight, input=x, bias=self.lin.bias).tanh()
        return functional.linear(x, self.lin.weight, bias=self.lin.bias)


def network():
    torch.manual_seed(0)
    heads = {"a": nn.Linear(22, 22), "b": Head(22)}
    branch = nn.Sequential(nn.Conv1d(3, 2, 1), nn.Dropout(0.2), nn.Linear(30, 22))
    return SplitModel(Encoder(), heads, {"both": branch}, {"a": "both", "b": "both"}).double()


def tasks():
    return [Task("a", lambda p, y: (p - y) ** 2), Task("b", lambda p, y: (p - y) ** 2, primary=False)]


def data(count):
    torch.manual_seed(1)
    return [
        Batch(
            torch.randn(3, 2, 2, 4, dtype=torch.float64),
            {name: torch.randn(3, 2, 22, dtype=torch.float64) for name in "ab"},
        )
        for _ in range(count)
    ]


def slopes(model, way, steps=4):
    shaper = Asking(ASK[way])
    step, optimizer = Step(model, tasks(), Method(shapers={"b": shaper})), torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(2)
    for batch in data(steps):
        optimizer.zero_grad()
        step.backward(batch, validation=batch, optimizer=optimizer)
        optimizer.step()
    return shaper.found[1:]


@pytest.mark.parametrize("way", ASK)
def test_slopes_are_what_they_are_without(way, monkeypatch):
    found = slopes(network(), way)
    monkeypatch.setattr("sidetask_core.passes.can_be_noted", lambda model: False)
    for one, expected in zip(found, slopes(network(), way), strict=True):
        close(one, expected, "slopes", rtol=1e-12)
    assert expected.abs().max() > 1e-6


class Multiplications(TorchDispatchMode):
    """Counts convolutions and matrix products, forward and forward-mode."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
        return func(*args, **(kwargs or {}))


def test_only_derivatives_are_multiplied():
    """Through three layers, the first of which has an input that does not move: five products instead of eight."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5).double() for _ in range(4)]
    model = SplitModel(nn.Sequential(layers[0], nn.Tanh(), layers[1]), {"a": layers[2], "b": layers[3]})
    counts = []

    def ask(signals):
        # What a look does besides: the step's own gradients, at first.
        signals.gradients("features")
        with Multiplications() as counted:
            found = signals.hindsight_elements("b")
        counts.append(counted.count)
        return found

    step = Step(model, tasks(), Method(shapers={"b": Asking(ask)}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(2, 6, 5, dtype=torch.float64)
    for _ in range(4):
        step.backward(Batch(x, {"a": y, "b": y}), optimizer=optimizer)
    # The main task's gradient comes first: of two weights, and of what is between them.
    assert counts[0] == 0
    assert counts[1] > counts[2] == counts[3] == 3 + 5


def test_from_a_product_that_is_another_one_on_all_are_computed():
    """A network that takes another way in another run, as nobody can foresee."""
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 4)
    x = torch.randn(2, 3)
    with torch.no_grad():
        names = products.named(nn.ModuleList([first, second, third]))
        with products.Noted(names) as noted:
            third(second(first(x)))
        with products.Reused(noted.found, names):
            assert first(x) is noted.found[0].value
            assert torch.equal(third(x.new_ones(2, 4)), functional.linear(x.new_ones(2, 4), third.weight, third.bias))
            assert torch.equal(second(x), functional.linear(x, second.weight, second.bias))
        with products.Reused(noted.found, names):
            for layer, one in zip((first, second, third), noted.found, strict=True):
                assert layer(torch.zeros(2, layer.in_features)) is one.value


def test_what_was_written_over_or_cannot_be_watched_is_computed():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    for run in (lambda: layer(x).relu_(), torch.inference_mode()(lambda: layer(x))):
        with torch.no_grad():
            with products.Noted(products.named(layer)) as noted:
                run()
            with products.Reused(noted.found, products.named(layer)):
                assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
            assert not noted.found[0].intact


@pytest.mark.parametrize("way", ["ahead", "back"])
def test_only_who_differentiates_exactly_keeps_products(way):
    for mode in ("exact", "one-sided"):
        model = network()
        ask = {"ahead": "lookahead_elements", "back": "hindsight_elements"}[way]
        shaper = Asking(lambda signals, ask=ask, mode=mode: getattr(signals, ask)("b", mode=mode))
        step, optimizer = (
            Step(model, tasks(), Method(shapers={"b": shaper})),
            torch.optim.SGD(model.parameters(), lr=0.1),
        )
        kept = []
        for batch in data(3):
            step.backward(batch, validation=batch, optimizer=optimizer)
            kept.append({*step._memory.noted})
        assert kept[-1] == ({"b"} if mode == "exact" else set())


def test_products_of_compiled_modules_are_not_noted():
    model = network()
    assert products.can_be_noted(model)
    model.heads["a"].compile(backend="eager")
    assert not products.can_be_noted(model)


class Learning(Weighting):
    """Weights that learn by their slopes, which makes any other bit in these show."""

    def __init__(self, tasks, back):
        super().__init__(tasks)
        self.register_buffer("weights", torch.ones(len(tasks)))
        self.back = back

    def forward(self, signals):
        slopes = signals.hindsight() if self.back else signals.lookahead(self.weights.clone())
        if slopes is not None:
            self.weights = (self.weights - 5.0 * slopes).clamp(min=0.01)
        return self.weights.clone()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(back, precision):
    """After a resume no values are there, so that the first look computes them again."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randn(4, 3, 8, 8, generator=generator),
            {name: torch.randn(4, 1, 8, 8, generator=generator) for name in ("a", "b")},
        )
        for _ in range(13)
    ]

    def build():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        encoder = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), convolutions[1], nn.ReLU())
        model = SplitModel(encoder, {name: nn.ConvTranspose2d(8, 1, 3) for name in ("a", "b")})
        step = Step(model, tasks(), Method(encoder=Learning(tasks(), back)))
        return step, torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)

    def train(step, optimizer, which):
        for batch in which:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                step.backward(batch, validation=batches[12], optimizer=optimizer)
            optimizer.step()

    step, optimizer = build()
    train(step, optimizer, batches[:4])
    saved = copy.deepcopy((step.state_dict(), optimizer.state_dict()))
    train(step, optimizer, batches[4:12])
    resumed, its_optimizer = build()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(resumed, its_optimizer, batches[4:12])
    assert not torch.equal(step.encoder.weights, torch.ones(2))
    for name, value in step.named_parameters():
        assert torch.equal(resumed.get_parameter(name), value), name
    assert torch.equal(resumed.encoder.weights, step.encoder.weights)


def test_what_a_transform_runs_is_left_to_it():
    """Tensors of `torch.func` cannot be taken apart."""

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(5, 4)

        def forward(self, x):
            return torch.vmap(lambda row: functional.linear(row, self.lin.weight, self.lin.bias).tanh())(x)

    torch.manual_seed(0)
    model = SplitModel(Mapped(), {name: nn.Linear(4, 3) for name in ("a", "b")}).double()
    batch = Batch(torch.randn(6, 5).double(), {name: torch.randn(6, 3).double() for name in ("a", "b")})
    found = []
    for reuse in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "can_be_noted", lambda _, reuse=reuse: reuse)
            asking = Asking(ASK["ahead"])
            step = Step(model, tasks(), Method(shapers={"b": asking}))
            for _ in range(3):
                step.backward(batch, validation=batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
            found.append(asking.found[-1])
    close(found[0], found[1], 1e-12)


class Shuffled(nn.Module):
    """Three layers of one shape, of which some are left out: in the runs after the first, the others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.left_out = itertools.cycle([2, 0])

    def forward(self, x):
        left_out = next(self.left_out)
        for k, layer in enumerate(self.layers):
            x = x if k == left_out else layer(x).tanh()
        return x


class Compiled(nn.Module):
    """Layers before, in and behind a function that was compiled by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        self.compiled = torch.compile(self.inside, backend="aot_eager")

    def inside(self, x):
        return functional.linear(x, self.inner.weight, self.inner.bias).tanh()

    def forward(self, x):
        return self.first(self.compiled(self.first(x)))


# Torch's own, from looking at whatever a function that it compiles is given.
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@looks_at_grad
@pytest.mark.parametrize("way", ASK)
@pytest.mark.parametrize("encoder", [Shuffled, Compiled])
def test_values_of_another_layer_are_never_taken(encoder, way, monkeypatch):
    """Where a second run goes another way, through shapes that are the same."""

    def found():
        torch.manual_seed(0)
        model = SplitModel(encoder(), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).double()
        shaper = Asking(ASK[way])
        step = Step(model, tasks(), Method(shapers={"b": shaper}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(5):
            x, y = torch.randn(2, 6, 4, dtype=torch.float64)
            optimizer.zero_grad()
            step.backward(Batch(x, {"a": y, "b": y}), validation=Batch(x + 1, {"a": y}), optimizer=optimizer)
            optimizer.step()
        return shaper.found[1:]

    reused = found()
    monkeypatch.setattr("sidetask_core.passes.can_be_noted", lambda model: False)
    for one, expected in zip(reused, found(), strict=True):
        close(one, expected, "slopes", rtol=1e-10)
    assert expected.abs().max() > 1e-6


@looks_at_grad
def test_a_function_is_compiled_once_with_and_once_without_a_look():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    encoder = Compiled()
    encoder.compiled = torch.compile(encoder.inside, backend=counter)
    model = SplitModel(encoder, {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).double()
    step = Step(model, tasks(), Method(shapers={"b": Asking(ASK["back"])}))
    optimizer, counts = torch.optim.SGD(model.parameters(), lr=0.1), []
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    for _ in range(6):
        step.backward(Batch(x, {"a": y, "b": y}), optimizer=optimizer)
        counts.append(counter.frame_count)
    assert counts[0] == 1
    assert counts[-1] <= 2


@pytest.mark.parametrize("way", [*ASK, "progress", "weights"])
def test_a_network_that_writes_over_its_input_cannot_be_run_again(way):
    """Its input would be another one, and so would the derivative, without anything to show for it."""

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x.mul_(0.5)).tanh()

    class Weighing(Weighting):
        def forward(self, signals):
            found = signals.progress() if way == "progress" else signals.lookahead(torch.ones(2))
            return torch.ones(2) if way == "progress" or found is None else found

    ones = Method(shapers={"b": Asking(ASK[way])}) if way in ASK else Method(encoder=Weighing(tasks()))
    model = SplitModel(Scaling(), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x, y = torch.randn(2, 6, 4)
    step = Step(model, tasks(), ones)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="writes over its input in place; let it work on a copy"):
        step.backward(Batch(x, {"a": y, "b": y}), validation=Batch(x.clone(), {"a": y}), optimizer=optimizer)
    plain = Step(model, tasks())
    plain.backward(Batch(x, {"a": y, "b": y}))
