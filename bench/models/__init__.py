"""The networks that jaxlayout is measured on, quickest first: real architectures, random weights."""

from bench.models.common import Model
from bench.models.convnext import convnext_tiny
from bench.models.mobilenet import mobilenet_v2
from bench.models.nchw import mobilenet_v2_nchw, resnet50_nchw
from bench.models.resnet import resnet50

MODELS: dict[str, Model] = {
    model.name: model for model in (mobilenet_v2, mobilenet_v2_nchw, resnet50, resnet50_nchw, convnext_tiny)
}

__all__ = ["MODELS", "Model"]
