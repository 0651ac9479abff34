"""Operations on the structure of a model: copy it, replace its layers, follow its channels."""

from workbench.surgery.layers import clone, layer_at, remembered, replace_layer, weighted_layers

__all__ = ["clone", "layer_at", "remembered", "replace_layer", "weighted_layers"]
