"""Adapters for other frameworks: each translates a framework's interface to `saef` and does no arithmetic.

DeepSpeed: `saef.integrations.deepspeed`. Horovod: `saef.integrations.horovod`. PyTorch DDP needs no adapter: its
communication hooks are in `saef.hooks`.
"""
