"""The adapter gives what TorchJD gives, and adds what a run needs: state, randomness of its own, absent tasks."""

import inspect
import math
import subprocess
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from sidetask_baselines import MGDA, CAGrad, PCGrad, SolverFailure
from sidetask_baselines.aligned_mtl import AlignedMTL
from sidetask_baselines.imtl_g import IMTLG
from sidetask_baselines.nash_mtl import NashMTL
from sidetask_baselines.torchjd import TorchJDCombiner, TorchJDWeighting, torchjd
from sidetask_core import Batch, MissingKey, Step, StepFailure
from sidetask_core.testing import batches, conformance, in_two_processes, problem, squared, tiny_tasks, train
from torch import nn
from torchjd import aggregation

pytestmark = pytest.mark.thorough

TASKS = tiny_tasks()
OPTIONS = {
    "CAGrad": {"c": 0.4},
    "Constant": {"weights": [1.0, 2.0, 3.0]},
    "CRMOGMWeighting": {"weighting": {"name": "PCGradWeighting"}},
    "FairGrad": {"alpha": 1.0},
    "GramianWeightedAggregator": {"gramian_weighting": {"name": "IMTLGWeighting"}},
    "Krum": {"n_byzantine": 0},
    "TrimmedMean": {"trim_number": 1},
    "WeightedAggregator": {"weighting": {"name": "SumWeighting"}},
}
SOLVERS = {"CAGrad": "cvxpy", "NashMTL": "ecos"}
not_dpp = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")


def every(kind):
    """Names of TorchJD's aggregators or weightings, each with a reason to skip it where its own solver is missing."""
    found = []
    for name in aggregation.__all__:
        if not inspect.isabstract(getattr(aggregation, name)) and name.endswith("Weighting") == (kind == "weighting"):
            needs = SOLVERS.get(name.removesuffix("Weighting"))
            missing = needs is not None and find_spec(needs) is None
            skip = pytest.mark.skipif(missing, reason=f"{name} needs {needs}: pip install 'torchjd[full]'")
            found.append(pytest.param(name, marks=skip))
    return found


def build(tasks, name, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(MoDo|SDMGrad)Weighting wants inner products")
        return torchjd(tasks, aggregator=name, options=options_of(name), **options)


def options_of(name):
    return OPTIONS.get(name) or OPTIONS.get(name.removesuffix("Weighting"))


def made(name):
    """The same object of TorchJD, made without the adapter."""
    options = dict(options_of(name) or {})
    for key, value in options.items():
        if isinstance(value, dict):
            options[key] = getattr(aggregation, value["name"])()
        elif isinstance(value, list):
            options[key] = torch.tensor(value, dtype=torch.float64)
    return getattr(aggregation, name)(**options, **({"n_tasks": 3} if name == "NashMTL" else {}))


def jacobian(model, batch):
    """Each task's gradient of the shared parameters ``[T, D]``, by plain autograd."""
    shared = list(model.shared_parameters())
    rows = []
    for name, prediction in model(batch.inputs).items():
        loss = squared(prediction, batch.targets[name]).mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]))
    return torch.stack(rows)


def seeded_like(rule_seed, steps):
    """The seeds that a rule draws for its steps."""
    generator = torch.Generator().manual_seed(rule_seed)
    return [int(torch.randint(2**62, (), generator=generator)) for _ in range(steps)]


@not_dpp
@pytest.mark.parametrize("name", every("aggregator"))
def test_every_aggregator_gives_what_it_gives_without_the_adapter(name):
    model, data, reference = problem(), batches(4), made(name)
    step = Step(model, TASKS, build(TASKS, name, seed=7))
    for batch, seed in zip(data, seeded_like(7, 4), strict=True):
        step.zero_grad()
        step.backward(batch)
        found = torch.cat([p.grad.flatten() for p in model.shared_parameters()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = reference(jacobian(model, batch))
        # NashMTL solves in single precision.
        rtol = 1e-4 if name == "NashMTL" else 1e-9
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.norm().item())


@pytest.mark.parametrize("name", every("weighting"))
def test_every_weighting_gives_what_it_gives_without_the_adapter(name):
    model, data, reference = problem(), batches(4), made(name)
    step = Step(model, TASKS, build(TASKS, name, seed=7))
    for batch, seed in zip(data, seeded_like(7, 4), strict=True):
        step.zero_grad()
        report = step.backward(batch)
        rows = jacobian(model, batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = reference(rows if name == "ExcessMTLWeighting" else rows @ rows.T)
        found = torch.stack(list(report.encoder_weights.values()))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_two_tasks_agree_with_the_rules_of_this_package(given, sample):
    """Where TorchJD's are exact: for two tasks neither orders nor Frank-Wolfe steps matter."""
    tasks = tiny_tasks(("a", "b"))
    for seed in range(10):
        signals = given((1.0, 2.0), torch.from_numpy(sample("random", 2, seed)))
        pairs = [
            (torchjd(tasks, aggregator="PCGrad"), PCGrad(tasks)),
            (torchjd(tasks, aggregator="MGDA"), MGDA(tasks, scale="paper")),
        ]
        for theirs, ours in pairs:
            torch.testing.assert_close(theirs.encoder(signals), ours(signals), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        *[("IMTLG", IMTLG, kind) for kind in ("random", "aligned", "duplicate", "norm ratios of 1e4", "tiny", "huge")],
        # Before 0.18, AlignedMTL takes singular values far below the largest for zero.
        *[("AlignedMTL", AlignedMTL, kind) for kind in ("random", "aligned", "duplicate", "tiny", "huge")],
    ],
)
def test_exact_rules_agree_with_those_of_this_package(theirs, ours, kind, given, sample):
    for count in (2, 3, 9):
        tasks = tiny_tasks("abcdefghi"[:count])
        for seed in range(5):
            g = torch.from_numpy(sample(kind, count, seed))
            signals = given([1.0] * count, g)
            expected = ours(tasks, scale="paper")(signals) @ g
            found = torchjd(tasks, aggregator=theirs).encoder(signals) @ g
            assert (found - expected).norm() <= 1e-8 * expected.norm()


@not_dpp
@pytest.mark.skipif(find_spec("ecos") is None, reason="NashMTL needs ecos: pip install 'torchjd[full]'")
def test_nash_mtl_agrees_with_the_rule_of_this_package(given, sample):
    for seed in range(5):
        signals = given(gradients=torch.from_numpy(sample("random", 3, seed)))
        theirs = torchjd(TASKS, aggregator="NashMTL", options={"max_norm": 0.0}).encoder(signals)
        torch.testing.assert_close(theirs, NashMTL(TASKS)(signals), rtol=1e-6, atol=0)


@pytest.mark.skipif(find_spec("cvxpy") is None, reason="CAGrad needs cvxpy: pip install 'torchjd[full]'")
def test_cagrad_agrees_with_the_rule_of_this_package(given, sample):
    for seed in range(10):
        g = torch.from_numpy(sample("random", 3, seed))
        theirs = torchjd(TASKS, aggregator="CAGrad", options={"c": 0.4}, scale="sum").encoder(given(gradients=g))
        torch.testing.assert_close(theirs @ g, CAGrad(TASKS)(given(gradients=g)) @ g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_upgrad_lets_no_task_ascend_whatever_the_scale(scale, given, sample):
    """TorchJD takes a Gramian of trace below 1e-4 for zero, and conflicts with it."""
    for seed in range(10):
        g = scale * torch.from_numpy(sample("random", 3, seed, size=3))
        weights = torchjd(TASKS, aggregator="UPGrad").encoder(given(gradients=g))
        direction = weights @ g
        # TorchJD adds 1e-4 to the diagonal.
        assert (g @ direction >= -1e-2 * g.norm(dim=1).max() * direction.norm()).all()
        reference = aggregation.UPGradWeighting()(g @ g.T / scale**2)
        torch.testing.assert_close(weights, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Mean", "Sum", "Constant", "Random", "ConstantWeighting"])
def test_what_reads_no_gradient_costs_none(name, given):
    signals = given()
    signals.gramian = signals.gradients = signals.norms = None
    weights = build(TASKS, name).encoder(signals)
    assert (weights > 0).all()


def test_weights_are_known_and_other_aggregators_combine():
    for name in ("UPGrad", "Mean", "PCGradWeighting"):
        assert isinstance(build(TASKS, name).encoder, TorchJDWeighting)
    for name in ("GradDrop", "ConFIG", "TrimmedMean"):
        assert isinstance(build(TASKS, name).encoder, TorchJDCombiner)


class Halved(aggregation.Mean):
    """A weighted aggregator that is not a weighted sum of what its weighting says."""

    def forward(self, matrix):
        return super().forward(matrix) / 2


class Longest(aggregation.Weighting):
    """Reads what it is given."""

    def forward(self, matrix):
        self.shape = matrix.shape
        return (matrix.norm(dim=1) == matrix.norm(dim=1).max()).to(matrix)


def test_an_aggregator_with_its_own_forward_combines(given, sample):
    g = torch.from_numpy(sample("random", 3, 0))
    combined = torchjd(TASKS, aggregator=Halved()).encoder(given(gradients=g))
    torch.testing.assert_close(combined, g.sum(0) / 6)


def test_wrapping_a_weighting_says_what_it_reads(given, sample):
    signals = given(gradients=torch.from_numpy(sample("random", 3, 0)))
    for wrapped, shape in [
        (Longest(), (3, 3)),
        (aggregation.GramianWeightedAggregator(Longest()), (3, 3)),
        (aggregation.WeightedAggregator(Longest()), (3, 50)),
    ]:
        rule = torchjd(TASKS, aggregator=wrapped).encoder
        assert rule(signals).sum() == 1
        assert rule.held.module.shape == shape


@pytest.mark.parametrize("name", ["PCGrad", "Random", "GradDrop", "GradVac"])
def test_the_global_generator_is_left_as_it_was(name):
    rule_state, state = [], torch.random.get_rng_state()
    for _ in range(2):
        step = Step(problem(), TASKS, build(TASKS, name))
        train(step, batches(2))
        assert torch.equal(torch.random.get_rng_state(), state)
        rule_state.append(torch.cat([p.grad.flatten() for p in step.model.parameters()]))
        torch.rand(5)
        state = torch.random.get_rng_state()
    assert torch.equal(*rule_state), "what the rule draws depends on the global generator"


@pytest.mark.parametrize("name", ["PCGrad", "Random", "GradDrop"])
def test_draws_change_from_step_to_step(name, given):
    g = torch.tensor([[1.0, 0.0, 0.3], [-1.0, 1.0, 0.1], [-1.0, -2.0, 0.5]], dtype=torch.float64)
    rule = build(TASKS, name).encoder
    assert len({tuple(rule(given(gradients=g)).tolist()) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("UPGrad", "pref_vector"),
        ("DualProj", "pref_vector"),
        ("AlignedMTL", "pref_vector"),
        ("ConFIG", "pref_vector"),
        ("Constant", "weights"),
        ("GradDrop", "leak"),
        ("MGDA", None),
        ("IMTLG", None),
    ],
)
def test_a_task_without_labels_is_as_if_it_were_not_there(name, vector):
    (batch,) = batches(1)
    absent = torch.full_like(batch.targets["b"], math.nan)

    def options(*values):
        return {vector: list(values)} if vector else None

    whole = Step(problem(), TASKS, torchjd(TASKS, aggregator=name, options=options(0.2, 0.9, 0.5)))
    whole.backward(Batch(batch.inputs, {**batch.targets, "b": absent}))
    rest = [TASKS[0], TASKS[2]]
    part = Step(problem().restricted_to(["a", "c"]), rest, torchjd(rest, aggregator=name, options=options(0.2, 0.5)))
    part.backward(batch)
    for key, p in part.model.named_parameters():
        torch.testing.assert_close(whole.model.get_parameter(key).grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["GradVac", "CRMOGMWeighting"])
def test_an_aggregator_with_state_cannot_leave_a_task_out(name):
    (batch,) = batches(1)
    step = Step(problem(), TASKS, build(TASKS, name))
    with pytest.raises(ValueError, match=r"state for each task .* no label for: b"):
        step.backward(Batch(batch.inputs, {**batch.targets, "b": None}))
    step.backward(Batch(batch.inputs, dict.fromkeys("abc")))
    assert all((p.grad == 0).all() for p in step.model.parameters() if p.grad is not None)


def test_the_scale_of_a_sum(given, sample):
    g = torch.from_numpy(sample("random", 3, 0))
    for name in ("Mean", "UPGrad", "ConFIG"):
        plain, summed = (torchjd(TASKS, aggregator=name, scale=s).encoder(given(gradients=g)) for s in ("paper", "sum"))
        torch.testing.assert_close(summed, 3 * plain)
    assert torchjd(TASKS, aggregator="Mean", scale="sum").encoder(given()).tolist() == [1, 1, 1]
    labelled = given(labelled=(True, False, True))
    assert torchjd(TASKS, aggregator="Mean", scale="sum").encoder(labelled).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["AlignedMTL", "ConFIG"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_may_have_another_precision_than_the_network(name, dtype):
    aggregator = getattr(aggregation, name)(pref_vector=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32))
    step = Step(problem(dtype=dtype), TASKS, torchjd(TASKS, aggregator=aggregator))
    train(step, batches(2, dtype=dtype))
    assert all(p.grad.isfinite().all() for p in step.model.parameters())


def test_what_is_not_finite_is_refused(given):
    bad = torch.ones(3, 4, dtype=torch.float64)
    bad[1, 1] = math.nan
    with pytest.raises(SolverFailure, match="not finite"):
        torchjd(TASKS, aggregator="UPGrad").encoder(given(gradients=bad))
    with pytest.raises(StepFailure, match="gradients of tasks b are not finite"):
        torchjd(TASKS, aggregator="TrimmedMean", options={"trim_number": 1}).encoder(given(gradients=bad))


def test_weights_that_are_not_finite_are_refused(given):
    """TorchJD's IMTLG of a Gramian whose inverse overflows, for one; here a weighting that says NaN."""

    class Broken(aggregation.Weighting):
        def forward(self, matrix):
            return matrix[:, 0] * math.nan

    g = torch.eye(3, 4, dtype=torch.float64)
    with pytest.raises(SolverFailure, match=r"Broken returned weights that are not finite .*condition number"):
        torchjd(TASKS, aggregator=Broken()).encoder(given(gradients=g))
    with pytest.raises(StepFailure, match="Broken returned weights that are not finite"):
        torchjd(TASKS, aggregator=aggregation.WeightedAggregator(Broken())).encoder(given(gradients=g))


class PerCoordinate(aggregation.Weighting):
    """Keeps state of the size of the gradients, as ExcessMTL does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", None)
        self.key = None

    def reset(self):
        self.total = self.key = None

    def forward(self, matrix):
        key = (matrix.shape, matrix.dtype, matrix.device)
        if key != self.key:
            self.total, self.key = torch.zeros_like(matrix), key
        self.total = self.total + matrix**2
        return self.total.sum(dim=1)


def test_state_follows_the_precision_of_the_network(given, sample):
    rule = torchjd(TASKS, aggregator=aggregation.WeightedAggregator(PerCoordinate())).encoder
    g = torch.from_numpy(sample("random", 3, 0))
    first = rule(given(gradients=g))
    torch.testing.assert_close(rule(given(gradients=g.float())), 2 * first, rtol=1e-6, atol=0)


def test_state_for_each_coordinate_needs_parameters():
    with pytest.raises(ValueError, match=r"PerCoordinate keeps state for each coordinate.*use at='parameters'"):
        torchjd(TASKS, aggregator=aggregation.WeightedAggregator(PerCoordinate()), at="features")


def test_the_state_of_another_class_is_refused():
    state = torchjd(TASKS, aggregator="UPGrad").encoder.state_dict()
    with pytest.raises((ValueError, RuntimeError), match="TorchJD's UPGradWeighting, not of DualProjWeighting"):
        torchjd(TASKS, aggregator="DualProj").encoder.load_state_dict(state)


def at_features(rank, world):
    (batch,) = batches(1)
    step = Step(problem(), TASKS, torchjd(TASKS, aggregator="ConFIG", at="features"))
    try:
        step.backward(Batch(batch.inputs[rank::world], {n: y[rank::world] for n, y in batch.targets.items()}))
    except ValueError as error:
        return str(error)
    return "no error"


def test_whole_gradients_at_features_are_refused_in_two_processes():
    assert at_features(0, 1) == "no error"
    for said in in_two_processes(at_features):
        assert "each of the 2 processes has only its samples' part at 'features'; use at='parameters'" in said


class PCDWeighting(aggregation.Weighting):
    """Stands for TorchJD's, which old releases do not have."""

    def forward(self, gramian):
        return torch.ones(len(gramian))


def test_pcd_needs_its_primary_task_first():
    torchjd(TASKS, aggregator=PCDWeighting())
    with pytest.raises(ValueError, match="first task for the one primary task; primary here: a"):
        torchjd(TASKS[::-1], aggregator=aggregation.GramianWeightedAggregator(PCDWeighting()))


def test_weightings_of_two_batches_warn():
    with pytest.warns(UserWarning, match="MoDoWeighting wants inner products between .* two independent batches"):
        torchjd(TASKS, aggregator="MoDoWeighting")


def test_torchjd_is_imported_on_use():
    code = "import sys, sidetask_baselines.torchjd; sys.exit('torchjd' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_torchjd_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"pip install 'sidetask-baselines\[torchjd\]'"):
        torchjd(TASKS, aggregator="UPGrad")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (MissingKey, f"{version('torchjd')} has no 'UPGard'; did you mean 'UPGrad'. ", {"aggregator": "UPGard"}),
        (MissingKey, "has no 'Weighting'; ", {"aggregator": "Weighting"}),
        (
            MissingKey,
            "'f' needs the 'name' of a class; it has: c",
            {"aggregator": "GradDrop", "options": {"f": {"c": 1}}},
        ),
        (TypeError, "unexpected keyword argument 'preference'", {"aggregator": "UPGrad", "options": {"preference": 1}}),
        (TypeError, "weighting or an aggregator of TorchJD, not Linear", {"aggregator": nn.Linear(1, 1)}),
        (ValueError, "beside an object", {"aggregator": aggregation.Mean(), "options": {}}),
        (ValueError, "at must be .* not 'heads'", {"aggregator": "UPGrad", "at": "heads"}),
        (ValueError, "scale must be .* not 'mean'", {"aggregator": "GradDrop", "scale": "mean"}),
    ],
)
def test_bad_options_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        torchjd(TASKS, **arguments)


def test_a_configuration_file_can_say_it_all():
    inner = {"name": "UPGradWeighting", "options": {"pref_vector": [0.5, 0.3, 0.2]}}
    method = torchjd(TASKS, aggregator="CRMOGMWeighting", options={"weighting": inner, "alpha": 0.5}, at="features")
    assert method.encoder.held.module.weighting.pref_vector.tolist() == [0.5, 0.3, 0.2]
    assert method.decoder is not None


class _AllLabels:
    """For aggregators with state, which refuse a batch without labels of a task."""

    test_a_task_without_labels_contributes_nothing = None


class _ItsOwnDraws:
    """TorchJD's GradDrop draws in the precision of the gradients, so that another precision draws other numbers."""

    test_single_precision_gives_the_same_gradients = None


TestUPGrad = conformance(torchjd, aggregator="UPGrad")
TestUPGradAtFeatures = conformance(
    torchjd, aggregator="UPGrad", at="features", options={"pref_vector": [1.0, 1.0, 1.0]}
)
TestMean = conformance(torchjd, aggregator="Mean", scale="sum")
TestRandom = conformance(torchjd, equivariant=False, aggregator="Random")
TestPCGrad = conformance(torchjd, equivariant=False, aggregator="PCGrad")
TestAlignedMTL = conformance(torchjd, aggregator="AlignedMTL", at="features")
TestConFIG = conformance(torchjd, aggregator="ConFIG")
TestTrimmedMean = conformance(torchjd, aggregator="TrimmedMean", options={"trim_number": 0})


class TestGradDrop(_ItsOwnDraws, conformance(torchjd, aggregator="GradDrop")):
    pass


class TestGradVac(_AllLabels, conformance(torchjd, equivariant=False, aggregator="GradVac")):
    pass


class TestCRMOGM(
    _AllLabels,
    conformance(torchjd, aggregator="CRMOGMWeighting", options={"weighting": {"name": "UPGradWeighting"}}),
):
    pass


@pytest.mark.skipif(not hasattr(aggregation, "ExcessMTL"), reason=f"TorchJD {version('torchjd')} has no ExcessMTL")
class TestExcessMTL(_AllLabels, conformance(torchjd, aggregator="ExcessMTL")):
    pass


@pytest.mark.skipif(not hasattr(aggregation, "PCD"), reason=f"TorchJD {version('torchjd')} has no PCD")
class TestPCD(_AllLabels, conformance(torchjd, equivariant=False, aggregator="PCD")):
    # Refused sooner: the primary task is not the first.
    test_state_of_other_tasks_is_refused = None


@not_dpp
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.skipif(find_spec("ecos") is None, reason="NashMTL needs ecos: pip install 'torchjd[full]'")
class TestNashMTL(
    _AllLabels,
    conformance(torchjd, equivariant=False, aggregator="NashMTL", options={"update_weights_every": 2, "max_norm": 0.5}),
):
    """Not solved well enough for two ways to the same inner products to agree to 1e-9."""

    test_two_processes_equal_one = None
