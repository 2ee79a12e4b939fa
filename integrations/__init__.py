"""Adapters for other frameworks: each translates a framework's interface to `saef` and does no arithmetic.

Horovod (`saef.integrations.horovod`) and DeepSpeed (`saef.integrations.deepspeed`) are planned. PyTorch DDP
needs no adapter: its communication hooks are in `saef.hooks`.
"""
