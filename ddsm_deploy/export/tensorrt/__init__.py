"""From ONNX to a TensorRT engine: graphs that would be misread are refused, each build runs in a process of its own.

The parent's side (`guard`, `builder`, `log`) imports onnx at most; `worker` alone imports NVIDIA's library.
"""
