"""From a model's file to a folder that Triton Inference Server serves: `config` writes what it is told, `repository`
the files. Needs onnx and tritonclient, no runtime and no torch.
"""
