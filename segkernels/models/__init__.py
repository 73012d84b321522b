"""Reference models for semantic segmentation: one file for each paper.

``create_model(name, num_classes=21, in_channels=3, ...)``, or the function with that name, builds a
model from images [N, in_channels, H, W] to class scores [N, num_classes, H, W]. Every model takes
``backend="torch"``, which builds it from plain torch layers with the same parameters and results,
and ``width``, a factor on the numbers of channels. `SegmentationModel` documents the methods of all
models: `predict`, `loss`, `load_backbone` and `save_pretrained`.
"""

# ruff: noqa: I001  (list_models has the order of these imports: that of the papers)

from segkernels.models._base import SegmentationModel as SegmentationModel
from segkernels.models._registry import create_model as create_model
from segkernels.models._registry import from_pretrained as from_pretrained
from segkernels.models._registry import list_models as list_models
from segkernels.models._weights import LoadReport as LoadReport
from segkernels.models.fcn import fcn32s as fcn32s
from segkernels.models.fcn import fcn16s as fcn16s
from segkernels.models.fcn import fcn8s as fcn8s
from segkernels.models.fcn_resnet import fcn_resnet50 as fcn_resnet50
from segkernels.models.fcn_resnet import fcn_resnet101 as fcn_resnet101
from segkernels.models.unet import unet as unet
from segkernels.models.dilatednet import dilatednet_frontend as dilatednet_frontend
from segkernels.models.dilatednet import dilatednet as dilatednet
from segkernels.models.dilatednet import dilatednet_large as dilatednet_large
from segkernels.models.deeplab_v1 import deeplab_v1 as deeplab_v1
from segkernels.models.deeplab_v2 import deeplab_v2_vgg16 as deeplab_v2_vgg16
from segkernels.models.deeplab_v2 import deeplab_v2_resnet101 as deeplab_v2_resnet101
from segkernels.models.deconvnet import deconvnet as deconvnet
from segkernels.models.segnet import segnet as segnet
from segkernels.models.fc_densenet import fc_densenet56 as fc_densenet56
from segkernels.models.fc_densenet import fc_densenet67 as fc_densenet67
from segkernels.models.fc_densenet import fc_densenet103 as fc_densenet103
from segkernels.models.pspnet import pspnet50 as pspnet50
from segkernels.models.pspnet import pspnet101 as pspnet101
from segkernels.models.deeplab_v3 import deeplab_v3_resnet50 as deeplab_v3_resnet50
from segkernels.models.deeplab_v3 import deeplab_v3_resnet101 as deeplab_v3_resnet101
from segkernels.models.deeplab_v3plus import deeplab_v3plus_resnet101 as deeplab_v3plus_resnet101
