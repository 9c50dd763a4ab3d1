"""Datasets for sidetask: tasks with losses and metrics, and splits whose batches are made on the device."""

# First, because torchmetrics, which everything below needs, imports torchvision.
from sidetask_datasets import _torchvision  # noqa: F401
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.celeba import celeba
from sidetask_datasets.cifar100_domains import cifar100_domains
from sidetask_datasets.cityscapes import cityscapes
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset
from sidetask_datasets.describe import describe, sheet
from sidetask_datasets.digit_domains import digit_domains
from sidetask_datasets.digits import digits
from sidetask_datasets.files import DataError, DataErrors
from sidetask_datasets.frames import frames
from sidetask_datasets.joined import JoinedSplit
from sidetask_datasets.noise import with_noise
from sidetask_datasets.nyuv2 import nyuv2
from sidetask_datasets.pascal_context import pascal_context
from sidetask_datasets.pseudo import fingerprint, pseudo, pseudo_label, thresholded, with_pseudo
from sidetask_datasets.reaching import reaching
from sidetask_datasets.rlbench import rlbench
from sidetask_datasets.samples import Samples
from sidetask_datasets.scenes import scenes
from sidetask_datasets.split import Split
from sidetask_datasets.stored import ResidentSplit, StreamedSplit
from sidetask_datasets.view import View, gallery, palette
from sidetask_datasets.virtual_kitti import virtual_kitti

__all__ = [
    "Augmentation",
    "Column",
    "DataError",
    "DataErrors",
    "Dataset",
    "JoinedSplit",
    "ResidentSplit",
    "Samples",
    "Split",
    "StreamedSplit",
    "View",
    "celeba",
    "cifar100_domains",
    "cityscapes",
    "describe",
    "digit_domains",
    "digits",
    "fingerprint",
    "frames",
    "gallery",
    "nyuv2",
    "palette",
    "pascal_context",
    "pseudo",
    "pseudo_label",
    "reaching",
    "rlbench",
    "scenes",
    "sheet",
    "thresholded",
    "virtual_kitti",
    "with_noise",
    "with_pseudo",
]
