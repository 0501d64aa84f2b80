"""The networks that jaxlayout is measured on, quickest first: real architectures, random weights."""

from bench.models.common import Model
from bench.models.convnext import convnext_tiny
from bench.models.efficientnet import efficientnet_b0
from bench.models.mobilenet import mobilenet_v2
from bench.models.nchw import mobilenet_v2_nchw, resnet50_nchw
from bench.models.resnet import resnet50
from bench.models.unet import unet3d
from bench.models.vae import vae3d_decoder

#: those of `make demo`
MODELS: dict[str, Model] = {
    model.name: model for model in (mobilenet_v2, mobilenet_v2_nchw, resnet50, resnet50_nchw, convnext_tiny)
}
ALL_MODELS: dict[str, Model] = MODELS | {model.name: model for model in (efficientnet_b0, unet3d, vae3d_decoder)}

__all__ = ["ALL_MODELS", "MODELS", "Model"]
