"""Reference networks, each a callable ``(dataset, *, cut=None, **options) -> SplitModel``.

They are the entry points of the group ``sidetask.networks`` that this package brings; another distribution adds its
own by declaring one.
"""

from sidetask_bench.networks.classifiers import lenet, resnet, vgg16
from sidetask_bench.networks.convolutional import small
from sidetask_bench.networks.fpn import fpn
from sidetask_bench.networks.frozen import frozen
from sidetask_bench.networks.mtan import mtan
from sidetask_bench.networks.pretrained import timm
from sidetask_bench.networks.resnet import deeplabv3
from sidetask_bench.networks.unet import unet

__all__ = ["deeplabv3", "fpn", "frozen", "lenet", "mtan", "resnet", "small", "timm", "unet", "vgg16"]
