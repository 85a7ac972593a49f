"""A model in the formats of others: MONAI bundle, ONNX, torch.export, TorchScript, one zip."""

from medssl.export.write import FORMATS, export_model

__all__ = ["FORMATS", "export_model"]
