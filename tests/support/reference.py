"""The slow, obviously correct oracle: each algorithm over a list of workers, in float64.

It imports neither `saef` nor torch.distributed; nothing is fused or updated in place, so that every line can
be held against the paper that its comment names. Vectors are flat (d,): the parameters, concatenated in
order. SAEF is Xu, Huo, Huang (2021), dist-EF is Zheng, Huang, Kwok (2019).

    saef = SAEF(Settings(scaled_sign, momentum=0.9), x0, K)       # x0: list of tensors of any shape
    saef.begin_step()                                             # averages the errors, if this step is to
    saef.step([gradient(k, saef.x_half(k)) for k in range(K)], lr=0.1)
    saef, x, x_tilde = run(settings, x0, grad_fn, lrs, K)         # the same in a loop; x, x_tilde: (T + 1, d)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Compressor = Callable[[Tensor], Tensor]  # one block (n,) -> what arrives of it (n,)
PerParameter = float | Sequence[float]  # one value for all parameters, or a list with one for each
Gradient = Tensor | Sequence[Tensor]  # flat (d,), or a list of tensors in the order of the parameters
GradFn = Callable[[int, int, list[Tensor]], Gradient]  # (k, t, parameters) -> worker k's gradient at step t
Protocol = Callable[[int, list[Tensor]], list[Tensor]]  # (t, the workers' states) -> their states after step t


def sign(v: Tensor) -> Tensor:
    """C(v) = sign(v), (n,) -> (n,), with sign(0) = sign(-0) = +1: one bit a coordinate. Not a contraction."""
    return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)


def scaled_sign(v: Tensor) -> Tensor:
    """C(v) = ||v||_1 / n * sign(v), (n,) -> (n,). SAEF eq. (2), dist-EF eq. (1)."""
    return v.abs().mean() * sign(v)


def top_k(ratio: float) -> Compressor:
    """C(v), (n,) -> (n,), keeps the k = max(1, ceil(ratio n)) largest |v|, ties to the lower index."""

    def C(v: Tensor) -> Tensor:
        k = max(1, math.ceil(ratio * v.numel()))
        kept = torch.sort(v.abs(), descending=True, stable=True).indices[:k]  # stable: ties in index order
        return torch.zeros_like(v).index_copy(0, kept, v[kept])

    return C


def in_bfloat16(C: Compressor) -> Compressor:
    """C(v), (n,) -> (n,), rounded from float32 to bfloat16, as it then travels."""
    return lambda v: C(v).float().bfloat16().to(v.dtype)


def identity(v: Tensor) -> Tensor:
    """C(v) = v, (n,) -> (n,): full precision."""
    return v


@dataclass(frozen=True)
class Partition:
    """Blocks G_1, ..., G_B of the flat vector; none crosses a parameter (dist-EF section 3.2).

    numels: coordinates of each parameter. block: "layer", one block a parameter; or an int, a maximal size:
    every parameter is cut into [0:block], [block:2 block], ... and what remains.
    """

    numels: tuple[int, ...]
    block: str | int = "layer"

    @property
    def blocks(self) -> list[slice]:
        """The blocks as slices of the flat vector; in order, they cover it exactly once."""
        blocks, start = [], 0
        for n in self.numels:
            size = max(n, 1) if self.block == "layer" else self.block
            blocks += [slice(start + a, start + min(a + size, n)) for a in range(0, n, size)]
            start += n
        return blocks


def blockwise(C: Compressor, partition: Partition) -> Compressor:
    """C_B(v) = [C(v_G1), ..., C(v_GB)], flat (d,) -> (d,). dist-EF section 3.2."""
    blocks = partition.blocks
    return lambda v: torch.cat([C(v[b]) for b in blocks])


@dataclass(frozen=True)
class Settings:
    """What the algorithms leave to choose.

    compressor      C, applied to each block; block: "layer" or a maximal size, see `Partition`
    server          "same": double-way with C; None: single-way, R = D; or the server's own compressor
    step_ahead      s in x_half = x - s e_k; 1: SAEF, 0: plain error feedback (EF)
    averaging       None (p = inf), ("allreduce", p) or ("rotating", p), see `SAEF.begin_step`; or a `Protocol`
    momentum        mu; u = m, or g + mu m if nesterov; no dampening
    weight_decay    lambda; mode "coupled": in g, at x_half; "outer": uncompressed, at x (dist-EF appendix A)
    max_grad_norm   clips each worker's whole gradient, before weight decay and momentum
    server_ahead    full step ahead, x_half = x - s (e_k + e); servers: None, every worker has e (replicated); or
                    the worker that serves each block, in order (sharded): x - s (e_k + K e where it serves)
    error_decay     beta: all errors are multiplied by it at the start of a step
    betas, eps, noise_correction    see `AdamW`; v_averaging: of its v, as averaging

    momentum, nesterov and weight_decay may be lists with one value a parameter.
    """

    compressor: Compressor = scaled_sign
    server: str | Compressor | None = "same"
    block: str | int = "layer"
    step_ahead: float = 1.0
    averaging: tuple[str, int] | Protocol | None = None
    momentum: PerParameter = 0.0
    nesterov: bool | Sequence[bool] = False
    weight_decay: PerParameter = 0.0
    weight_decay_mode: str = "coupled"
    max_grad_norm: float | None = None
    server_ahead: bool = False
    servers: Sequence[int] | None = None
    error_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    noise_correction: bool = True
    v_averaging: tuple[str, int] | Protocol | None = None


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """1/K sum_k v_k, (d,), summed in rank order."""
    return sum(vectors) / len(vectors)


def clip(g: Tensor, max_norm: float | None) -> Tensor:
    """min(1, max_norm / (||g||_2 + 1e-6)) g, (d,): `torch.nn.utils.clip_grad_norm_` on one flat vector."""
    return g if max_norm is None else min(1.0, max_norm / (g.norm().item() + 1e-6)) * g


def momentum_rule(m: Tensor, g: Tensor, mu: Tensor, nesterov: Tensor) -> tuple[Tensor, Tensor]:
    """(m, u), (d,) each: m <- mu m + g, then u = g + mu m (Nesterov) or u = m. As `torch.optim.SGD` does.

    Where mu = 0, u = g, and m stays what it was: it counts again once mu is set.
    """
    new = mu * m + g  # Alg. 1, line 10
    return torch.where(mu == 0, m, new), torch.where(nesterov, g + mu * new, new)


class Workers:
    """K workers with the same x, (d,) float64, and the step number t. The algorithms below derive from it."""

    def __init__(self, settings: Settings, x0: Sequence[Tensor], K: int) -> None:
        self.settings, self.K, self.t = settings, K, 0
        self.shapes, self.numels = [p.shape for p in x0], tuple(p.numel() for p in x0)
        self.d = sum(self.numels)
        self.x = self.flat(x0)
        self.C = blockwise(settings.compressor, Partition(self.numels, settings.block))
        self.mu, self.lam = self.spread(settings.momentum), self.spread(settings.weight_decay)
        self.nesterov = self.spread(settings.nesterov).bool()
        self.e, self.m = [self.zeros() for _ in range(K)], [self.zeros() for _ in range(K)]

    def zeros(self) -> Tensor:
        """0, (d,)."""
        return torch.zeros(self.d, dtype=torch.float64)

    def flat(self, tensors: Gradient) -> Tensor:
        """Tensors in the order of the parameters, or one that is flat already, as a new flat (d,) vector."""
        tensors = [tensors] if torch.is_tensor(tensors) else tensors
        v = torch.cat([p.detach().reshape(-1).double() for p in tensors])
        if v.numel() != self.d:
            raise ValueError(f"expected {self.d} coordinates in all, got {v.numel()}")
        return v

    def tensors(self, v: Tensor) -> list[Tensor]:
        """A flat (d,) vector as new tensors with the parameters' shapes."""
        return [u.reshape(s) for u, s in zip(v.clone().split(self.numels), self.shapes, strict=True)]

    def spread(self, value: PerParameter) -> Tensor:
        """One value, or a list of one for each parameter, as a (d,) vector."""
        values = value if isinstance(value, (list, tuple)) else [value] * len(self.numels)
        pairs = zip(self.numels, values, strict=True)
        return torch.cat([torch.full((n,), float(a), dtype=torch.float64) for n, a in pairs])

    def begin_step(self) -> None:
        """What precedes the gradients of step t: nothing, unless the algorithm overrides it."""

    def x_half(self, k: int) -> list[Tensor]:
        """Where worker k takes its gradient in step t, as tensors: x, unless the algorithm overrides it."""
        return self.tensors(self.x)

    def x_tilde(self) -> Tensor:
        """The error-corrected iterate, (d,): x where there are no errors."""
        return self.x


def ring(t: int, X: list[Tensor]) -> list[Tensor]:
    """Each worker takes the mean of both its neighbours and itself; of two workers, of both. MixML SyncDR."""
    K = len(X)
    return [mean([X[j] for j in sorted({(k - 1) % K, k, (k + 1) % K})]) for k in range(K)]


def slack(gamma: float) -> Protocol:
    """x_k <- x_k + gamma/K sum_j (x_j - x_k). MixML section 6."""
    return lambda t, X: [x + gamma / len(X) * sum(y - x for y in X) for x in X]


def pairs(meetings: Callable[[int, int], list[tuple[int, int]]]) -> Protocol:
    """In step t the pairs meetings(t, K) average, one after the other. MixML AsyncDR."""

    def protocol(t: int, X: list[Tensor]) -> list[Tensor]:
        X = list(X)
        for i, j in meetings(t, len(X)):
            X[i] = X[j] = mean([X[i], X[j]])
        return X

    return protocol


def every(period: int, protocol: Protocol) -> Protocol:
    """The protocol in those steps t with (t + 1) % period == 0; nothing in the others."""
    return lambda t, X: protocol(t, X) if (t + 1) % period == 0 else X


class SAEF(Workers):
    """SAEF Algorithm 1: EF-SGD(M) at step_ahead = 0, SAEF-SGD(M) at 1. Errors are in parameter units.

    State, (d,) each: x; e[k] and m[k] of worker k; e_server; m_tilde, the outer decay's momentum. And t.
    Of the last step: u[k], D_k[k], sent[k] = C(D_k), D, R, outer; the step was x <- x - R - outer.
    Differences from the paper: p = 1 is allowed; lines 11-12 are one, D_k = e_k + eta m_k (eq. (24) has -).
    """

    def __init__(self, settings: Settings, x0: Sequence[Tensor], K: int) -> None:
        super().__init__(settings, x0, K)
        partition, server = Partition(self.numels, settings.block), settings.server
        self.C_server = self.C if server == "same" else blockwise(server or identity, partition)
        at_x = self.decays_at_x(settings.weight_decay_mode)
        self.lam, self.lam_outer = (self.zeros(), self.lam) if at_x else (self.lam, self.zeros())
        self.e_server, self.m_tilde = self.zeros(), self.zeros()
        self.share = [self.zeros() + 1 for _ in range(K)]
        if settings.servers is not None:
            for k in range(K):
                self.share[k] = self.zeros()
                for block, server in zip(partition.blocks, settings.servers, strict=True):
                    self.share[k][block] = K * (server == k)
        self.begun = False

    def decays_at_x(self, mode: str) -> bool:
        """Whether weight decay is applied to x, not to the gradient."""
        return {"coupled": False, "outer": True}[mode]

    def begin_step(self) -> None:
        """e_k <- beta mean_k e_k at the start of step t, for those coordinates [a, b) that are due; else beta e_k.

        allreduce p: all d of them iff (t+1) % p == 0. rotating p: [d j // p, d (j+1) // p) with j = t % p.
        """
        self.begun = True
        beta = self.settings.error_decay
        self.e = [beta * e for e in self.averaged(self.e, self.settings.averaging)]
        self.e_server = beta * self.e_server

    def averaged(self, e: list[Tensor], averaging: tuple[str, int] | Protocol | None) -> list[Tensor]:
        """The workers' errors after the averaging of step t."""
        if callable(averaging):
            return averaging(self.t, e)
        kind, p = averaging or (None, 1)
        j, d = self.t % p, self.d
        everything = (0, d) if (self.t + 1) % p == 0 else (0, 0)  # Alg. 1, line 6
        a, b = {None: (0, 0), "allreduce": everything, "rotating": (d * j // p, d * (j + 1) // p)}[kind]
        average = mean(e)
        return [torch.cat([own[:a], average[a:b], own[b:]]) for own in e]  # Alg. 1, line 7

    def x_half(self, k: int) -> list[Tensor]:
        """x_half = x - s e_k, tensors with the parameters' shapes (Alg. 1, line 9); full step ahead: also by e."""
        ahead = self.e[k] + self.share[k] * self.e_server if self.settings.server_ahead else self.e[k]
        return self.tensors(self.x - self.settings.step_ahead * ahead)

    def direction(self, k: int, grad: Gradient) -> Tensor:
        """u_k, (d,): clip the gradient, add lambda x_half, apply the momentum rule. Alg. 1, line 10."""
        g = clip(self.flat(grad), self.settings.max_grad_norm) + self.lam * self.flat(self.x_half(k))
        self.m[k], u = momentum_rule(self.m[k], g, self.mu, self.nesterov)
        return u

    def corrected(self, k: int, eta: Tensor) -> Tensor:
        """D_k = e_k + x_half - (x_half - eta u_k) = e_k + eta u_k, (d,). Alg. 1, lines 11-12."""
        return self.e[k] + eta * self.u[k]

    def step(self, grads: Sequence[Gradient], lr: PerParameter) -> None:
        """The rest of step t: grads[k] is worker k's gradient at x_half(k), lr is eta_t. Lines 10-25."""
        if not self.begun or len(grads) != self.K:
            raise RuntimeError(f"call begin_step() first and give {self.K} gradients, got {len(grads)}")
        eta = self.spread(lr)
        self.u = [self.direction(k, grads[k]) for k in range(self.K)]  # Alg. 1, line 10
        self.D_k = [self.corrected(k, eta) for k in range(self.K)]  # Alg. 1, lines 11-12
        self.sent = [self.C(D_k) for D_k in self.D_k]  # Alg. 1, line 19
        self.e = [D_k - C_D_k for D_k, C_D_k in zip(self.D_k, self.sent, strict=True)]  # Alg. 1, line 18
        self.D = self.e_server + mean(self.sent)  # Alg. 1, line 21
        self.R = self.C_server(self.D)  # Alg. 1, line 23
        self.e_server = self.D - self.R  # Alg. 1, line 22
        self.outer = eta * self.decay()
        self.x = self.x - self.R - self.outer  # Alg. 1, line 25
        self.t, self.begun = self.t + 1, False

    def decay(self) -> Tensor:
        """What weight decay at x moves x by, over eta. dist-EF appendix A."""
        self.m_tilde, w = momentum_rule(self.m_tilde, self.lam_outer * self.x, self.mu, self.nesterov)
        return w

    def x_tilde(self) -> Tensor:
        """x~ = x - (e + mean_k e_k), (d,); a step moves it by -eta_t/K sum_k u_k - outer. SAEF eq. (3).

        With error_decay begin_step moves it first, by (1 - beta) (e + mean_k e_k).
        """
        return self.x - (self.e_server + mean(self.e))


class AdamW(SAEF):
    """Algorithm 1 with the rule of torch.optim.AdamW (weight_decay_mode "decoupled") or Adam ("coupled").

    p   = m_k / (1 - b1^t)                      momentum before this step, corrected; at t = 0 p = g_k
    m_k = b1 m_k + (1 - b1) g_k
    v_k = b2 v_k + (1 - b2) (g_k^2 / K + (1 - 1/K) g_k p)    noise-corrected; else b2 v_k + (1 - b2) g_k^2
    u_k = [m_k / (1 - b1^(t+1))] / (sqrt(max(v_k / (1 - b2^(t+1)), 0)) + eps);  for K > 1 clamped to [-1, 1]

    g_k^2 alone overestimates the second moment of the mean gradient by up to K; E[g_k p] is the square of its
    expectation, since p is older than g_k's noise. One worker is torch's AdamW.
    """

    def __init__(self, settings: Settings, x0: Sequence[Tensor], K: int) -> None:
        super().__init__(settings, x0, K)
        self.v = [self.zeros() for _ in range(K)]

    def begin_step(self) -> None:
        super().begin_step()
        self.v = self.averaged(self.v, self.settings.v_averaging)

    def decays_at_x(self, mode: str) -> bool:
        return {"coupled": False, "decoupled": True}[mode]

    def decay(self) -> Tensor:
        """lambda x: uncompressed, without a momentum."""
        return self.lam_outer * self.x

    def direction(self, k: int, grad: Gradient) -> Tensor:
        (b1, b2), t, K = self.settings.betas, self.t, self.K
        g = clip(self.flat(grad), self.settings.max_grad_norm) + self.lam * self.flat(self.x_half(k))
        p = self.m[k] / (1 - b1**t) if t else g
        square = g**2 / K + (1 - 1 / K) * g * p if self.settings.noise_correction else g**2
        self.m[k] = b1 * self.m[k] + (1 - b1) * g
        self.v[k] = b2 * self.v[k] + (1 - b2) * square
        m, v = self.m[k] / (1 - b1 ** (t + 1)), self.v[k] / (1 - b2 ** (t + 1))
        u = m / (v.clamp(min=0).sqrt() + self.settings.eps)
        return u.clamp(-1, 1) if K > 1 else u


class LocalSteps(SAEF):
    """The difference form: H steps of each worker's own optimizer, of torch.optim, on X = x_half.

    X = x_half = x - s e_k; H steps on X;  D_k = e_k + (x_half - X);  then Algorithm 1 from line 18 on.
    outer: (lr, mu) of Nesterov's momentum on R, b = mu b + R, x <- x - lr (R + mu b); None: x <- x - R.
    overlap: R of a round is applied at the end of the next, which begins at x - S_k - s e_k.
    Settings: momentum and weight_decay are the optimizer's own, so not here.
    """

    def __init__(
        self,
        settings: Settings,
        x0: Sequence[Tensor],
        K: int,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        outer: tuple[float, float] | None = None,
        overlap: bool = False,
    ) -> None:
        super().__init__(settings, x0, K)
        self.X = [self.tensors(self.x) for _ in range(K)]
        self.optimizers = [make(X) for X in self.X]
        self.outer_rate, self.b = outer, self.zeros()
        self.overlap, self.flying = overlap, None

    def begin_step(self) -> None:
        super().begin_step()
        for k in range(self.K):
            for X, half in zip(self.X[k], self.x_half(k), strict=True):
                X.copy_(half)

    def x_half(self, k: int) -> list[Tensor]:
        half = super().x_half(k)
        if self.flying is None:
            return half
        return [v - S for v, S in zip(half, self.tensors(self.flying[k]), strict=True)]

    def local_step(self, k: int, grads: Sequence[Tensor], lr: float) -> None:
        """Worker k's gradients at X[k]."""
        for X, g in zip(self.X[k], grads, strict=True):
            X.grad = g
        for group in self.optimizers[k].param_groups:
            group["lr"] = lr
        self.optimizers[k].step()

    def direction(self, k: int, grad: Gradient) -> Tensor:
        return self.flat(self.x_half(k)) - self.flat(self.X[k])

    def end_round(self) -> None:
        """After the last local step of each."""
        x = self.x
        if not self.overlap:
            super().step(self.X, 1.0)
            self.x = x - self.outer_step(self.R)
            return
        u = [self.direction(k, None) for k in range(self.K)]
        if self.flying is not None:
            D = self.e_server + mean(self.flying)
            R = self.C_server(D)
            self.e_server, self.x = D - R, x - self.outer_step(R)
        D_k = [e + v for e, v in zip(self.e, u, strict=True)]
        self.flying = [self.C(D) for D in D_k]
        self.e = [D - S for D, S in zip(D_k, self.flying, strict=True)]
        self.t, self.begun = self.t + 1, False

    def outer_step(self, R: Tensor) -> Tensor:
        """What x moves by."""
        if self.outer_rate is None:
            return R
        lr, mu = self.outer_rate
        self.b = mu * self.b + R
        return lr * (R + mu * self.b)

    def x_tilde(self) -> Tensor:
        """With overlap what is on its way counts as not sent."""
        return super().x_tilde() - (0 if self.flying is None else mean(self.flying))


def drive_rounds(workers: LocalSteps, grad_fn: GradFn, lrs: Sequence[float], local_steps: int) -> tuple[Tensor, Tensor]:
    """One local step for each of lrs; (x, x_tilde) after each round, from the start."""
    x, x_tilde = [workers.x], [workers.x_tilde()]
    for t, lr in enumerate(lrs):
        if t % local_steps == 0:
            workers.begin_step()
        for k in range(workers.K):
            workers.local_step(k, grad_fn(k, t, workers.X[k]), lr)
        if (t + 1) % local_steps == 0:
            workers.end_round()
            x.append(workers.x)
            x_tilde.append(workers.x_tilde())
    return torch.stack(x), torch.stack(x_tilde)


class DistEF(Workers):
    """dist-EF Algorithms 2 and 3 (momentum 0) and 4 (Nesterov) as printed: errors in gradient units.

    Settings: compressor, block, momentum, weight_decay (appendix A); those left must be what makes `SAEF` the
    same algorithm. State, (d,) each: x; e[i], m[i] of worker i; e_tilde of the server; m_tilde of the weight
    decay; eta, the last step's, eta_{-1} = 0. Erratum: Algorithm 4, line 6 has the g that Lemma 3 needs.
    """

    def __init__(self, settings: Settings, x0: Sequence[Tensor], K: int) -> None:
        super().__init__(settings, x0, K)
        s = settings
        given = (s.server, s.step_ahead, s.averaging, s.weight_decay_mode, s.max_grad_norm)
        if given != ("same", 0, None, "outer", None) or (self.mu[~self.nesterov] != 0).any():
            raise ValueError("dist-EF: double-way, step_ahead=0, outer decay, Nesterov; nothing else")
        self.e_tilde, self.m_tilde, self.eta = self.zeros(), self.zeros(), self.zeros()

    def step(self, grads: Sequence[Gradient], lr: PerParameter) -> None:
        """Step t, gradients at x. ZeroDivisionError at eta_t = 0, where eta_{t-1}/eta_t has no value."""
        mu, lam, x, eta = self.mu, self.lam, self.x, self.spread(lr)
        if (eta == 0).any():
            raise ZeroDivisionError("dist-EF multiplies errors by eta_{t-1} / eta_t: eta_t must not be 0")
        ratio, Delta = self.eta / eta, []
        for i in range(self.K):  # on each worker i
            g = self.flat(grads[i])
            self.m[i] = mu * self.m[i] + g  # Alg. 4, line 5
            p = mu * self.m[i] + g + ratio * self.e[i]  # Alg. 2-3, line 5; Alg. 4, line 6
            Delta.append(self.C(p))  # Alg. 2-3, line 6; Alg. 4, line 7
            self.e[i] = p - Delta[i]  # Alg. 2-3, line 8; Alg. 4, line 9
        p_tilde = mean(Delta) + ratio * self.e_tilde  # Alg. 2-3, line 10; Alg. 4, line 11
        Delta_tilde = self.C(p_tilde)  # Alg. 2-3, line 11; Alg. 4, line 12
        self.e_tilde = p_tilde - Delta_tilde  # Alg. 2-3, line 12; Alg. 4, line 13
        self.m_tilde = mu * self.m_tilde + lam * x  # appendix A
        self.x = x - eta * (Delta_tilde + mu * self.m_tilde + lam * x)  # Alg. 2-3, line 7; Alg. 4, line 8
        self.eta, self.t = eta, self.t + 1

    def x_tilde(self) -> Tensor:
        """x~ = x - eta_{t-1} (e~ + mean_i e_i), (d,). dist-EF Lemmas 1 and 3."""
        return self.x - self.eta * (self.e_tilde + mean(self.e))


class MajorityVote(Workers):
    """signSGD (momentum 0) and signum with majority vote, dist-EF section 4.

    m_k = beta m_k + (1 - beta) g_k; vote = sign(sum_k sign(m_k)); x <- x - eta (vote + lambda x).
    A tie votes +1. Settings: momentum (beta), weight_decay.
    """

    def step(self, grads: Sequence[Gradient], lr: PerParameter) -> None:
        """Step t, gradients at x; the vote, (d,), stays readable."""
        self.m = [self.mu * m + (1 - self.mu) * self.flat(g) for m, g in zip(self.m, grads, strict=True)]
        self.vote = sign(sum(sign(m) for m in self.m))
        self.x = self.x - self.spread(lr) * (self.vote + self.lam * self.x)
        self.t += 1


class MomentumSGD(Workers):
    """Full-precision momentum SGD, as `torch.optim.SGD` does it.

    g = mean_k clip(g_k) + lambda x; m = mu m + g; x <- x - eta u, u = m or g + mu m (Nesterov).
    Settings: momentum, nesterov, weight_decay (coupled), max_grad_norm (each worker's, as in `SAEF`).
    """

    def step(self, grads: Sequence[Gradient], lr: PerParameter) -> None:
        """Step t, gradients at x. There is one momentum, the mean gradient's: m[0]."""
        g = mean([clip(self.flat(g), self.settings.max_grad_norm) for g in grads]) + self.lam * self.x
        self.m[0], u = momentum_rule(self.m[0], g, self.mu, self.nesterov)
        self.x = self.x - self.spread(lr) * u
        self.t += 1


def drive(workers: Workers, grad_fn: GradFn, lrs: Sequence[PerParameter]) -> tuple[Workers, Tensor, Tensor]:
    """One step for each eta_t in lrs; returns (workers, x, x_tilde), trajectories (T + 1, d) from t = 0."""
    x, x_tilde = [workers.x], [workers.x_tilde()]
    for eta in lrs:
        workers.begin_step()
        workers.step([grad_fn(k, workers.t, workers.x_half(k)) for k in range(workers.K)], eta)
        x.append(workers.x)
        x_tilde.append(workers.x_tilde())
    return workers, torch.stack(x), torch.stack(x_tilde)


def run(
    settings: Settings, x0: Sequence[Tensor], grad_fn: GradFn, lrs: Sequence[PerParameter], K: int
) -> tuple[SAEF, Tensor, Tensor]:
    """`drive` an SAEF from x0; grad_fn(k, t, params) is worker k's gradient in step t, params its x_half."""
    return drive(SAEF(settings, x0, K), grad_fn, lrs)
