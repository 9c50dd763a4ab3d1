import pytest
from sidetask_baselines.cagrad import cagrad
from sidetask_baselines.dwa import dwa
from sidetask_baselines.fixed import equal, fixed
from sidetask_baselines.graddrop import graddrop
from sidetask_baselines.mgda import mgda
from sidetask_baselines.pcgrad import pcgrad
from sidetask_baselines.rlw import rlw
from sidetask_baselines.uncertainty import uncertainty
from sidetask_core.testing import conformance

pytestmark = pytest.mark.thorough

TestEqual = conformance(equal)
TestFixed = conformance(fixed, weights={"a": 1.0, "b": 0.5, "c": 0.0})
TestUncertainty = conformance(uncertainty)
TestDWA = conformance(dwa)
TestDWAByStep = conformance(dwa, window=2)
TestRLW = conformance(rlw, equivariant=False)
TestPCGrad = conformance(pcgrad, equivariant=False)
TestPCGradAtFeatures = conformance(pcgrad, equivariant=False, at="features")
TestCAGrad = conformance(cagrad)
TestCAGradAtFeatures = conformance(cagrad, at="features")
TestMGDA = conformance(mgda)
TestMGDANormalized = conformance(mgda, normalization="loss+", at="parameters")
TestGradDrop = conformance(graddrop, leak={"a": 0.2})
TestGradDropOverParameters = conformance(graddrop, at="parameters")
