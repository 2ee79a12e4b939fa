"""Algorithm 1 over a list of K workers in one process and on one device: for experiments, not for training.

Training scripts use `saef.SAEFState`, a rank a worker. Here nothing is sent, so a step costs the K gradients and what
saef's kernels take; it is Algorithm 1 all the same, with the real messages: the kernels of `saef.wire.kernels` are
called directly, which only this repository may do. On a GPU a whole step can be one CUDA graph (`capture`), in which
the workers run beside each other.

Vectors are flat, over the d coordinates of the model, as everywhere in saef.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

import saef
from saef.rules.rule import table as hyper_table
from saef.rules.sgd import LR, SGD, Hyper
from saef.wire import kernels
from saef.wire.kernels.table import Update, Worker

WAYS = ("streams", "channels-last", "vmap")
TOLERANCE = 1e-4  # a graph's first step and the same step without it, relative


class Workers:
    """K workers with the same weights x, each with its own gradient, momentum and error.

    Args:
        net: the model at x_0, on its device, float32 or float64. Batch norm takes each worker's own batch.
        K: workers.
        compressor: C, both ways.
        ahead: s in x_half = x - s e_k. 1: SAEF; 0: EF.
        averaging: of the errors, `saef.AllReduce` or `saef.Rotating`; None: p = inf.
        lr, momentum, weight_decay: of `torch.optim.SGD`. `lr` may be changed between steps: `workers.lr.fill_(eta)`.
        way: how K gradients are taken. streams: K networks, on a GPU each on a stream of its own. channels-last: that,
            with images and kernels in this memory format. vmap: one network over stacked weights.

    Attributes:
        x, e_server: [d].
        half, e, m, g: [K, d]; g as of the last step.
        losses: [K], of the last step's batches at x_half.
    """

    def __init__(
        self,
        net: nn.Module,
        K: int,
        compressor: saef.Compressor,
        ahead: float,
        averaging: saef.AllReduce | saef.Rotating | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        way: str = "streams",
    ) -> None:
        x0 = [p.detach() for p in net.parameters()]
        self.shapes, numels = [p.shape for p in x0], [p.numel() for p in x0]
        self.K, self.d, self.ahead, self.averaging, self.way = K, sum(numels), ahead, averaging, way
        self.device, self.dtype = x0[0].device, x0[0].dtype

        self.x, self.e_server = self.zeros(), self.zeros()
        self.half, self.e, self.m, self.g = (self.zeros(K) for _ in range(4))
        self.losses = torch.zeros(K, dtype=self.dtype, device=self.device)
        for view, p in zip(self.tensors(self.x), x0, strict=True):
            view.copy_(p)

        codec = saef.Codec(compressor, numels, self.dtype)
        self.table = codec.layout.table.to(self.device)
        wide = torch.zeros(K + 1, -(-codec.message_bytes // 16) * 16, dtype=torch.uint8, device=self.device)
        self.messages, self.reply = wide[:K, : codec.message_bytes], wide[K, : codec.message_bytes]
        hyper = Hyper(lr, momentum, gain=1.0, nesterov=False, weight_decay=weight_decay, factor=1.0)
        self.update = Update(SGD.kind, hyper_table([hyper], self.dtype, self.device), ahead, feedback=True)
        self.lr = self.update.hyper[:, LR]
        self.once = torch.ones(1, dtype=self.dtype, device=self.device)  # D contains eta
        self.kernels = kernels.select(self.device)

        cuda = self.device.type == "cuda"
        self.streams = [torch.cuda.Stream(self.device) for _ in range(K)] if cuda else []
        self.look_ahead()
        self.nets = [with_batch_statistics(deepcopy(net)) for _ in range(1 if way == "vmap" else K)]
        for net, half in zip(self.nets, self.half, strict=False):
            for p, view in zip(net.parameters(), self.tensors(half), strict=True):
                p.data = view

    # ---- memory --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes and the next one reads."""
        return [self.x, self.e_server, self.half, self.e, self.m]

    def zeros(self, *rows: int) -> Tensor:
        """[*rows, d]. Rows begin as torch aligns a tensor, at multiples of 512 bytes: cuDNN and Triton look at that."""
        width = -(-self.d // 128) * 128
        return torch.zeros(*rows, width, dtype=self.dtype, device=self.device)[..., : self.d]

    def tensors(self, v: Tensor) -> list[Tensor]:
        """Views of v, [..., d], with the parameters' shapes behind the dots."""
        pieces = v.split([shape.numel() for shape in self.shapes], dim=-1)
        return [self.view(piece, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def view(self, v: Tensor, shape: torch.Size) -> Tensor:
        if self.way == "channels-last" and len(shape) == 4:
            out, inputs, height, width = shape
            return v.view(out, height, width, inputs).permute(0, 3, 1, 2)
        return v.unflatten(-1, shape)

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor of a parameter's shape in the order in which it lies in the flat vectors."""
        if self.way == "channels-last" and tensor.dim() == 4:
            tensor = tensor.permute(0, 2, 3, 1)
        return tensor.reshape(-1)

    def x_tilde(self) -> Tensor:
        """x~ = x - (e + mean_k e_k), [d]. SAEF eq. (3)."""
        return self.x - self.e_server - self.e.mean(0)

    # ---- a step --------------------------------------------------------------------------------------------------

    def begin(self, t: int) -> None:
        """What precedes the gradients of step t: the errors' average, if it is due. Alg. 1, lines 6-9."""
        if self.averaging is not None:
            due = self.averaging.due(t, self.d)
            if due.start < due.stop:
                self.e[:, due] = self.e[:, due].mean(0)  # Alg. 1, line 7
                self.look_ahead()

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Lines 10-25 and the next step's line 9. images [K, n, ...], labels [K, n]. Never waits for the device."""
        if self.way == "vmap":
            self.all_gradients(images, labels)
        elif self.way == "channels-last":
            images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, images.shape[:2])
        for k in range(self.K):
            with self.beside(k):
                if self.way != "vmap":
                    self.gradient(k, images[k], labels[k])
                self.send(k)
        self.join()
        self.receive()

    def gradient(self, k: int, images: Tensor, labels: Tensor) -> None:
        """g_k at x_half of worker k, whose parameters are views of it."""
        loss = F.cross_entropy(self.nets[k](images), labels)
        grads = torch.autograd.grad(loss, list(self.nets[k].parameters()))
        torch.cat([self.flat(g) for g in grads], out=self.g[k])
        self.losses[k] = loss.detach()

    def all_gradients(self, images: Tensor, labels: Tensor) -> None:
        """All g_k at once: K networks as one with K times the channels."""

        def loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.nets[0], parameters, (images,)), labels)

        names = [name for name, _ in self.nets[0].named_parameters()]
        stacked = dict(zip(names, self.tensors(self.half), strict=True))
        grads, losses = vmap(grad_and_value(loss))(stacked, images, labels)
        self.g.copy_(torch.cat([grads[name].flatten(1) for name in names], 1))
        self.losses.copy_(losses)

    def send(self, k: int) -> None:
        worker = Worker(self.g[k], self.m[k : k + 1], self.e[k], self.x)
        self.kernels.compress(self.table, self.update, worker, self.messages[k])  # Alg. 1, lines 10-12, 19
        self.kernels.commit(self.table, self.update, worker, self.messages[k])  # Alg. 1, line 18

    def receive(self) -> None:
        table, server = self.table, (self.messages, self.e_server, self.reply)
        self.kernels.serve(table, table, *server)  # Alg. 1, lines 21, 23
        self.kernels.settle(table, table, *server)  # Alg. 1, line 22
        self.kernels.subtract(table, self.once, self.reply, self.x)  # Alg. 1, line 25
        self.look_ahead()

    def look_ahead(self) -> None:
        torch.sub(self.x, self.e, alpha=self.ahead, out=self.half)  # Alg. 1, line 9

    def check(self) -> None:
        """Raise if a kernel has met a malformed message. Waits for the device."""
        kernels.check(self.device)

    # ---- streams -------------------------------------------------------------------------------------------------

    @contextmanager
    def beside(self, k: int) -> Iterator[None]:
        """On a GPU: on worker k's stream, after what the current one has been given so far."""
        if not self.streams:
            yield
            return
        self.streams[k].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.streams[k]):
            yield

    def join(self) -> None:
        """What the current stream is given from here on waits for all workers."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


def with_batch_statistics(net: nn.Module) -> nn.Module:
    """The net with batch norm that takes the batch's statistics and keeps none."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


# ---- a step as a CUDA graph -----------------------------------------------------------------------------------------


def capture(
    step: Callable[[], None], state: Sequence[Tensor], results: Callable[[], Sequence[Tensor]]
) -> Callable[[], None]:
    """`step` as one CUDA graph, to be called in its place; the state stays as it is.

    Args:
        step: works on memory that stays where it is, draws no random numbers, and does not wait for the device.
        state: what it changes and reads again.
        results: by what a step is compared with the same step without a graph.

    Raises:
        RuntimeError: if the two are not the same, to TOLERANCE or ten times what two steps without a graph differ by.
    """
    before = [v.clone() for v in state]

    def back() -> None:
        for v, old in zip(state, before, strict=True):
            v.copy_(old)

    def found(run: Callable[[], None]) -> list[Tensor]:
        back()
        run()
        return [v.to(torch.float64, copy=True) for v in results()]

    # Kernels are compiled and convolutions chosen here: a capture must find all of that done, for the same streams.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, second, third = (found(step) for _ in range(3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    back()
    with torch.cuda.graph(graph, stream=stream):
        step()
    replayed = found(graph.replay)
    back()
    torch.cuda.synchronize()

    for i, (again, eager, ours) in enumerate(zip(second, third, replayed, strict=True)):
        noise, apart = (((v - eager).norm() / eager.norm()).item() for v in (again, ours))
        if not apart <= max(TOLERANCE, 10 * noise):
            raise RuntimeError(
                f"the first step of the CUDA graph is not the step without a graph: result {i} differs by {apart:.1e}, "
                f"relative; two steps without a graph differ by {noise:.1e}. Run without the graph"
            )
    return graph.replay
