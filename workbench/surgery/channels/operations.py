"""Which operations and layers treat channels how; names are those of functions, methods and operators."""

from __future__ import annotations

from torch import nn


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    """
    relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid hardshrink sigmoid
    logsigmoid tanh tanhshrink softplus softsign softshrink threshold dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth drop_path exp expm1 log log1p sqrt rsqrt abs
    neg sign square pow reciprocal erf sin cos clamp clip round nan_to_num contiguous clone detach float half double
    bfloat16 to type type_as add iadd radd sub isub rsub mul imul rmul multiply subtract truediv itruediv div divide
    true_divide maximum minimum where masked_fill lerp addcmul addcdiv positive identity requires_grad
    """
)
POOLING = _words(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate
    upsample pad
    """
)
RESHAPING = frozenset({"view", "reshape", "flatten", "expand"})
REARRANGING = _words(
    """
    permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze getitem select narrow unbind chunk split
    tensor_split roll flip
    """
)
REDUCING = _words("mean sum amax amin std var logsumexp norm")
SHAPELESS = _words("dim ndim ndimension dtype device is_cuda is_floating_point requires_grad layout")

ELEMENTWISE_LAYERS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
POOL_LAYERS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
