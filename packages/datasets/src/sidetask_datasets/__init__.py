"""Datasets for sidetask: tasks with losses and metrics, and splits whose batches are made on the device."""

# First, because torchmetrics, which everything below needs, imports torchvision.
from sidetask_datasets import _torchvision  # noqa: F401
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset
from sidetask_datasets.digits import digits
from sidetask_datasets.files import DataError
from sidetask_datasets.frames import frames
from sidetask_datasets.noise import with_noise
from sidetask_datasets.pseudo import fingerprint, pseudo, pseudo_label, thresholded, with_pseudo
from sidetask_datasets.scenes import scenes
from sidetask_datasets.split import ResidentSplit, Split
from sidetask_datasets.view import View, gallery, palette

__all__ = [
    "Augmentation",
    "Column",
    "DataError",
    "Dataset",
    "ResidentSplit",
    "Split",
    "View",
    "digits",
    "fingerprint",
    "frames",
    "gallery",
    "palette",
    "pseudo",
    "pseudo_label",
    "scenes",
    "thresholded",
    "with_noise",
    "with_pseudo",
]
