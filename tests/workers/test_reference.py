"""The oracle against what is exactly true of it, against torch.optim.SGD and against numbers by hand.

Every trajectory runs on `Problem`, small enough for all combinations of settings and irregular enough to tell
them apart. The last tests break the algorithm on purpose: an oracle that cannot fail proves nothing.
"""

import itertools

import pytest
import torch

from support.reference import (
    SAEF,
    AdamW,
    DistEF,
    MajorityVote,
    MomentumSGD,
    Partition,
    Settings,
    blockwise,
    drive,
    identity,
    run,
    scaled_sign,
    sign,
    top_k,
)

UNIT = 2.0**-53  # unit roundoff of float64: one operation errs by at most UNIT times its result
WORKERS = (1, 2, 4, 8)
MOMENTUM = {"sgd": (0.0, False), "heavy ball": (0.9, False), "nesterov": (0.9, True)}
AVERAGING = (None, ("allreduce", 1), ("allreduce", 5), ("rotating", 3))
COMPRESSORS = {"sign": sign, "scaled_sign": scaled_sign, "top_k": top_k(0.2), "identity": identity}
# Warm-up, a jump by 10, decay. LRS begins with 0 and has another inside, where dist-EF would divide by it.
LRS = [0.0, 0.01, 0.02, 0.03, 0.3, 0.3, 0.0, 0.3, 0.1, 0.01]
LRS_POSITIVE = [0.005, 0.01, 0.02, 0.03, 0.3, 0.3, 0.2, 0.3, 0.1, 0.01]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Vectors of 19 coordinates gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Problem:
    """g_k,t(x) = A_k x - b_k + c tanh(W_k x) + noise_k,t: each worker its own function, each step its noise.

    common: the workers share A, and c = 0; quadratics with one Hessian.
    """

    def __init__(self, common: bool = False, steps: int = len(LRS)) -> None:
        gen = torch.Generator().manual_seed(2021)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen)  # noqa: E731
        self.x0 = [draw(3, 4), draw(5), draw(1), draw(())]
        self.numels = [p.numel() for p in self.x0]
        d, K = sum(self.numels), max(WORKERS)
        B = draw(K, d, d)
        self.A = B @ B.transpose(1, 2) / (2 * d) + 0.1 * torch.eye(d, dtype=torch.float64)
        self.b, self.W, self.noise, self.c = draw(K, d), draw(K, d, d) / d**0.5, 0.5 * draw(steps, K, d), 0.5
        if common:
            self.A, self.c = self.A[:1].expand(K, d, d), 0.0

    def gradients(self, t: int, X: torch.Tensor) -> torch.Tensor:
        """The gradients of all workers, (K, d), at X, (K, d)."""
        K = len(X)
        linear = (self.A[:K] @ X[:, :, None])[:, :, 0] - self.b[:K]
        return linear + self.c * torch.tanh((self.W[:K] @ X[:, :, None])[:, :, 0]) + self.noise[t, :K]

    def __call__(self, k: int, t: int, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `run` wants it: one worker, tensors in and out."""
        assert [p.shape for p in params] == [p.shape for p in self.x0]
        x = torch.cat([p.reshape(-1) for p in params])
        g = self.A[k] @ x - self.b[k] + self.c * torch.tanh(self.W[k] @ x) + self.noise[t, k]
        return [piece.reshape(p.shape) for piece, p in zip(g.split(self.numels), self.x0, strict=True)]


PROBLEM, QUADRATIC = Problem(), Problem(common=True)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return ((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max())).item()


# For trajectories that agree in exact arithmetic. A step commits at most (6 K + 20) UNIT of the largest
# entry (counted in `violation`). Errors in x stay, and 10 steps add them up; errors in a momentum reach x
# multiplied by at most eta / (1 - mu) = 3; the problem does not amplify them, its curvature times eta being
# below 1. In all, 10 * (1 + 3) * 68 UNIT = 3e-13. A compressor could make a flipped sign or another choice
# of k out of a rounding error, but only where two numbers agree to 15 digits, which does not happen with
# this seed.
SAME = 1e-12


# --- 1. the invariant ---------------------------------------------------------------------------------------


class SGDAgain:
    """u_k and the decay at x once more, from the gradients and x, batched over the workers."""

    def __init__(self, saef: SAEF) -> None:
        s, lam = saef.settings, saef.spread(saef.settings.weight_decay)
        self.mu, self.nesterov = saef.spread(s.momentum), saef.spread(s.nesterov).bool()
        self.coupled, self.outer = (lam, 0 * lam) if s.weight_decay_mode == "coupled" else (0 * lam, lam)
        self.m = torch.zeros(saef.K, saef.d, dtype=torch.float64)
        self.m_tilde = torch.zeros(saef.d, dtype=torch.float64)

    def __call__(self, t: int, g: torch.Tensor, X: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g = g + self.coupled * X
        self.m, self.m_tilde = self.mu * self.m + g, self.mu * self.m_tilde + self.outer * x
        u = torch.where(self.nesterov, self.mu * self.m + g, self.m)
        return u, torch.where(self.nesterov, self.mu * self.m_tilde + self.outer * x, self.m_tilde)


class AdamWAgain:
    """The same for AdamW, moments as the sums that they are: m_k / (1 - b1^(t+1)) is a mean of the gradients."""

    def __init__(self, saef: AdamW) -> None:
        self.s, self.lam, self.seen, self.squares = saef.settings, saef.spread(saef.settings.weight_decay), [], []

    def __call__(self, t: int, g: torch.Tensor, X: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        K, coupled = len(g), self.s.weight_decay_mode == "coupled"
        g = g + self.lam * X if coupled else g
        p = self.average(self.seen, self.s.betas[0]) if t else g
        noise = K if self.s.noise_correction else 1
        self.seen.append(g)
        self.squares.append(g * (g / noise + (p - p / noise)))
        m, v = (self.average(part, b) for part, b in zip((self.seen, self.squares), self.s.betas, strict=True))
        u = m / (torch.where(v > 0, v, 0.0).sqrt() + self.s.eps)
        return (u.clamp(-1, 1) if K > 1 else u), (0 * x if coupled else self.lam * x)

    @staticmethod
    def average(vectors: list[torch.Tensor], beta: float) -> torch.Tensor:
        """sum_i beta^(t-i) v_i / sum_i beta^(t-i)."""
        weights = [beta**i for i in range(len(vectors))][::-1]
        return sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)


def violation(saef: SAEF, lrs: list, problem: Problem = PROBLEM) -> float:
    """Largest residual of x~_{t+1} = x~_t - eta_t / K sum_k u_k - decay, in units of what rounding may leave.

    The unit is `unit(K)` of the largest number involved. u_k and the decay are recomputed here. With error_decay x~_t
    is what begin_step leaves, x~ + (1 - beta) (e + mean_k e_k); with full step ahead and s = 1 also the mean x_half.
    """
    K, s, worst = saef.K, saef.settings, 0.0
    again = AdamWAgain(saef) if isinstance(saef, AdamW) else SGDAgain(saef)
    for t, lr in enumerate(lrs):
        x, eta, owed = saef.x, saef.spread(lr), saef.x - saef.x_tilde()
        saef.begin_step()
        x_tilde = saef.x_tilde()
        X = torch.stack([saef.flat(saef.x_half(k)) for k in range(K)])
        g = problem.gradients(t, X)
        saef.step(list(g), lr)
        u, decay = again(t, g, X, x)
        residuals = [saef.x_tilde() - (x_tilde - eta * u.mean(0) - eta * decay), x_tilde - (x - s.error_decay * owed)]
        if s.server_ahead and s.step_ahead == 1.0:
            residuals.append(X.mean(0) - x_tilde)
        terms = (x, saef.x, x_tilde, eta * u, saef.D, saef.R, *saef.D_k, *saef.sent, *X)
        size = max(v.abs().max() for v in terms)
        assert size.isfinite()
        worst = max(worst, *((r.abs().max() / (unit(K) * size)).item() for r in residuals))
    return worst


def unit(K: int) -> float:
    """2 (6 K + 20) UNIT, 1.6e-14 at most.

    A mean over K workers is K operations on partial sums of up to K times `size`; dividing by K leaves K UNIT. There
    are six: of e_k (averaging, both x~), of the averaged e_k, of C(D_k), of u_k. D_k, e_k, D, e, x, both x~,
    the decay and the residual take at most 20 operations more. All are below twice `size`: the factor 2.
    """
    return 2 * (6 * K + 20) * UNIT


@pytest.mark.parametrize("server", ["same", None])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_invariant(compressor, server):
    """All combinations; four K and two partitions are dealt round, so that each pair of values meets."""
    axes = (AVERAGING, MOMENTUM.values(), ("coupled", "outer"), (0.0, 0.5, 1.0))
    for n, choice in enumerate(itertools.product(*(enumerate(axis) for axis in axes))):
        (a, averaging), (b, (mu, nesterov)), (c, mode), (h, s) = choice
        K, block = WORKERS[(a + b + c + h) % 4], ("layer", 4)[n % 2]
        settings = Settings(COMPRESSORS[compressor], server, block, s, averaging, mu, nesterov, 0.05, mode)
        assert violation(SAEF(settings, PROBLEM.x0, K), LRS) <= 1, (K, settings)


@pytest.mark.parametrize("mode", ["coupled", "outer"])
@pytest.mark.parametrize("K", WORKERS)
def test_invariant_with_parameter_groups_and_another_server_compressor(K, mode):
    settings = Settings(scaled_sign, top_k(0.5), 4, 1.0, ("rotating", 4), [0.9, 0.0, 0.5, 0.9],
                        [True, False, False, False], [0.0, 0.1, 0.05, 0.2], mode)  # fmt: skip
    lrs = [[eta, 0.0, 0.5 * eta, 0.2] for eta in LRS]
    assert violation(SAEF(settings, PROBLEM.x0, K), lrs) <= 1


def serving(form: str, K: int, block: str | int) -> dict:
    """The settings of full step ahead: blocks are dealt to the servers in turn."""
    blocks = len(Partition(tuple(PROBLEM.numels), block).blocks)
    servers = [i % K for i in range(blocks)] if form == "sharded" else None
    return {"server_ahead": form != "without", "servers": servers}


@pytest.mark.parametrize("form", ["replicated", "sharded"])
@pytest.mark.parametrize("server", ["same", None])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_invariant_with_full_step_ahead_and_decaying_errors(compressor, server, form):
    """Full step ahead costs K e where a rank serves, within the factor 2 of `unit`; error_decay two operations."""
    for (a, averaging), (b, K) in itertools.product(enumerate(AVERAGING), enumerate(WORKERS)):
        block, s, beta = ("layer", 4)[b % 2], (1.0, 0.5)[(a + b) % 2], (1.0, 0.95)[b // 2]
        more = {"error_decay": beta, **serving(form, K, block)}
        settings = Settings(COMPRESSORS[compressor], server, block, s, averaging, 0.9, **more)
        assert violation(SAEF(settings, PROBLEM.x0, K), LRS) <= 1, (K, settings)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["without", "replicated", "sharded"])
@pytest.mark.parametrize("server", ["same", None])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_invariant_of_adamw(compressor, server, form):
    """To SAME of the largest number: v may cancel, to 1e-4 of its terms, before its root is divided by."""
    axes = (AVERAGING, ("decoupled", "coupled"), (0.0, 0.5, 1.0))
    for (a, averaging), (b, mode), (c, s) in itertools.product(*map(enumerate, axes)):
        K, block = WORKERS[(a + b + c) % 4], ("layer", 4)[(b + c) % 2]
        correction, beta = (True, False)[a // 2], (1.0, 0.95)[(a + c) % 2]
        more = {"error_decay": beta, "noise_correction": correction, "betas": (0.9, 0.99), **serving(form, K, block)}
        settings = Settings(COMPRESSORS[compressor], server, block, s, averaging, weight_decay=0.05,
                            weight_decay_mode=mode, **more)  # fmt: skip
        assert violation(AdamW(settings, PROBLEM.x0, K), LRS) * unit(K) <= SAME, (K, settings)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("compressor", ["scaled_sign", "top_k"])
def test_lemmas_1_and_3_hold_for_dist_ef_in_its_own_units(compressor, nesterov):
    mu = 0.9 if nesterov else 0.0
    dist_ef = DistEF(ef(COMPRESSORS[compressor], 4, mu), PROBLEM.x0, 4)
    for t, eta in enumerate(LRS_POSITIVE):
        x_tilde = dist_ef.x_tilde()
        g = PROBLEM.gradients(t, dist_ef.x.expand(4, -1))
        dist_ef.step(list(g), eta)
        u = mu * torch.stack(dist_ef.m) + g  # Lemma 3; Lemma 1 at mu = 0
        assert difference(dist_ef.x_tilde(), x_tilde - eta * u.mean(0)) <= SAME


# --- 2., 3., 5. where full-precision momentum SGD must come out ---------------------------------------------


def sgd(K, mu, nesterov, lam=0.0, problem=PROBLEM):
    """The trajectory (T + 1, d) of full-precision momentum SGD."""
    settings = Settings(momentum=mu, nesterov=nesterov, weight_decay=lam)
    return drive(MomentumSGD(settings, problem.x0, K), problem, LRS)[1]


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("momentum", MOMENTUM)
def test_single_way_with_averaging_at_every_step_is_momentum_sgd_on_x_tilde(compressor, momentum):
    """e = 0, and e_k = mean e, so that x_half = x~. One worker needs no averaging for it."""
    mu, nesterov = MOMENTUM[momentum]
    cases = [(K, ("allreduce", 1)) for K in WORKERS] + [(1, averaging) for averaging in AVERAGING]
    for K, averaging in cases:
        settings = Settings(COMPRESSORS[compressor], None, "layer", 1.0, averaging, mu, nesterov, 0.05)
        x_tilde = run(settings, PROBLEM.x0, PROBLEM, LRS, K)[2]
        assert difference(x_tilde, sgd(K, mu, nesterov, 0.05)) <= SAME, (K, averaging)


LESS = [{"step_ahead": 0.0}, {"step_ahead": 0.5}, {"averaging": None}, {"server": "same"}]


@pytest.mark.parametrize("other", LESS)
def test_anything_less_is_not_momentum_sgd_on_x_tilde(other):
    """The same comparison sees each condition that the equality needs."""
    settings = Settings(**{"server": None, "averaging": ("allreduce", 1), "momentum": 0.9, **other})
    assert difference(run(settings, PROBLEM.x0, PROBLEM, LRS, 4)[2], sgd(4, 0.9, False)) > 1e-4


@pytest.mark.parametrize("mode", ["coupled", "outer"])
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("K", WORKERS)
def test_identity_compressor_is_momentum_sgd(K, momentum, mode):
    """No errors, so x_half = x, and outer decay is coupled decay: the two momenta add up to the one."""
    mu, nesterov = MOMENTUM[momentum]
    want = sgd(K, mu, nesterov, 0.05)
    for server, s, averaging in itertools.product(["same", None], [0.0, 1.0], [None, ("rotating", 3)]):
        settings = Settings(identity, server, 4, s, averaging, mu, nesterov, 0.05, mode)
        _, x, x_tilde = run(settings, PROBLEM.x0, PROBLEM, LRS, K)
        assert difference(x, want) <= SAME and difference(x_tilde, want) <= SAME


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("K", WORKERS)
def test_on_a_common_quadratic_single_way_saef_is_momentum_sgd_for_every_period(K, compressor):
    """The mean of A x_half - b_k is A x~ - mean b_k, whatever the e_k are."""
    want = sgd(K, 0.9, False, problem=QUADRATIC)
    for averaging in (None, ("allreduce", 1), ("allreduce", 3), ("allreduce", 5), ("rotating", 3)):
        settings = Settings(COMPRESSORS[compressor], None, averaging=averaging, momentum=0.9)
        assert difference(run(settings, QUADRATIC.x0, QUADRATIC, LRS, K)[2], want) <= SAME, averaging


@pytest.mark.parametrize("compressor", ["identity", "scaled_sign"])
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_adamw_of_one_worker_is_torch_optim_adamw(mode, compressor):
    """60 steps: a rate that jumps and is 0, decay and betas that change. With a compressor, of x~ single-way.

    Relative to `SAME` steps are six times as many, and u divides by a root; Adam bounds each by eta, so that rounding
    adds up and is not amplified: 60 * 4 * 68 UNIT = 2e-12 at the most, and what is asked stays SAME.
    """
    problem, T = Problem(steps=60), 60
    lrs = [0.02 * min(1.0, t / 10) * (10.0 if t % 17 == 16 else 1.0) * 0.97**t * (t != 20) for t in range(T)]
    server, s = ("same", 0.0) if compressor == "identity" else (None, 1.0)
    settings = Settings(COMPRESSORS[compressor], server, step_ahead=s, betas=(0.8, 0.95), weight_decay=0.1,
                        weight_decay_mode=mode)  # fmt: skip
    ours, params = AdamW(settings, problem.x0, 1), [torch.nn.Parameter(p.clone()) for p in problem.x0]
    kind = {"decoupled": torch.optim.AdamW, "coupled": torch.optim.Adam}[mode]
    optimizer = kind(params, betas=(0.8, 0.95), weight_decay=0.1)
    found, want = [], []
    for t, lr in enumerate(lrs):
        ours.begin_step()
        ours.step([problem(0, t, ours.x_half(0))], lr)
        for p, g in zip(params, problem(0, t, [p.detach() for p in params]), strict=True):
            p.grad = g
        optimizer.param_groups[0].update(lr=lr)
        optimizer.step()
        found.append(ours.x_tilde())
        want.append(torch.cat([p.detach().reshape(-1) for p in params]))
    if compressor == "identity" or mode == "coupled":  # decoupled decay is at x, which is not x~
        assert difference(torch.stack(found), torch.stack(want)) <= SAME
    else:
        assert 1e-6 < difference(torch.stack(found), torch.stack(want)) < 0.1


def test_two_steps_of_adamw_by_hand():
    """Two workers, b1 = 1/2, b2 = 3/4, eps = 2^-20 left out of the sums below: it changes the seventh digit."""
    settings = Settings(identity, betas=(0.5, 0.75), eps=2.0**-20)
    adamw = AdamW(settings, [vector(0, 0)], 2)
    adamw.begin_step()
    adamw.step([vector(4, 1), vector(-2, 0)], 1.0)
    assert [m.tolist() for m in adamw.m] == [[2, 0.5], [-1, 0]]  # g / 2
    assert [v.tolist() for v in adamw.v] == [[4, 0.25], [1, 0]]  # g^2 / 4, since p = g
    assert [u.tolist() for u in adamw.u] == [pytest.approx([1, 1], rel=1e-5), pytest.approx([-1, 0], rel=1e-5)]
    adamw.begin_step()
    adamw.step([vector(2, -3), vector(4, 2)], 1.0)  # p = m / (1/2) = (4, 1), (-2, 0)
    assert [m.tolist() for m in adamw.m] == [[2, -1.25], [1.5, 1]]
    # g^2 / 2 + g p / 2 = (6, 3), (4, 2); v = 3/4 v + that / 4
    assert [v.tolist() for v in adamw.v] == [[4.5, 0.9375], [1.75, 0.5]]
    m, v = 0.75, 1 - 0.75**2  # what corrects
    assert adamw.u[0][0].item() == pytest.approx(2 / m / (4.5 / v) ** 0.5, rel=1e-5)
    assert adamw.u[1].tolist() == pytest.approx([1.5 / m / (1.75 / v) ** 0.5, 1], rel=1e-5)  # the second is clamped


def test_a_negative_second_moment_counts_as_zero():
    adamw = AdamW(Settings(identity, betas=(0.5, 0.75)), [vector(0)], 4)
    for g in (8.0, -1.0, -1.0, -1.0):
        adamw.begin_step()
        adamw.step([vector(g)] * 4, 0.1)
    assert adamw.v[0].item() > 0
    adamw.v = [v - 100 for v in adamw.v]
    adamw.begin_step()
    adamw.step([vector(1.0)] * 4, 0.1)
    assert adamw.u[0].abs().item() == 1 and adamw.x.isfinite().all()


def test_momentum_sgd_is_torch_optim_sgd_with_parameter_groups_and_clipping():
    """Nothing in it comes from here: groups, Nesterov, coupled decay, changing rates, 4 workers that clip."""
    mu, nesterov, lam = [0.9, 0.0, 0.5, 0.9], [True, False, False, True], [0.0, 0.1, 0.05, 0.2]
    lrs = [[eta, 0.1, 0.5 * eta, 0.2] for eta in LRS]
    settings = Settings(identity, momentum=mu, nesterov=nesterov, weight_decay=lam, max_grad_norm=5.5)
    clipped = []

    params = [torch.nn.Parameter(p.clone()) for p in PROBLEM.x0]
    groups = [{"params": [p], "lr": 0.0, "momentum": a, "nesterov": b, "weight_decay": c}
              for p, a, b, c in zip(params, mu, nesterov, lam, strict=True)]  # fmt: skip
    optimizer, want = torch.optim.SGD(groups), [torch.cat([p.detach().reshape(-1) for p in params])]
    for t, lr in enumerate(lrs):
        total = [torch.zeros_like(p) for p in params]
        for k in range(4):
            for p, g in zip(params, PROBLEM(k, t, [p.detach() for p in params]), strict=True):
                p.grad = g
            clipped.append(torch.nn.utils.clip_grad_norm_(params, 5.5) > 5.5)
            total = [a + p.grad for a, p in zip(total, params, strict=True)]
        for p, g, group, eta in zip(params, total, optimizer.param_groups, lr, strict=True):
            p.grad, group["lr"] = g / 4, eta
        optimizer.step()
        want.append(torch.cat([p.detach().reshape(-1) for p in params]))

    assert any(clipped) and not all(clipped)
    for algorithm in (MomentumSGD, SAEF):
        x = drive(algorithm(settings, PROBLEM.x0, 4), PROBLEM, lrs)[1]
        assert difference(x, torch.stack(want)) <= SAME


# --- 4. the two papers' units -------------------------------------------------------------------------------


def ef(compressor, block="layer", mu=0.0, lam=0.0):
    """The settings under which SAEF is dist-EF: Algorithm 3 at mu = 0, else 4."""
    return Settings(compressor, "same", block, 0.0, None, mu, mu > 0, lam, "outer")


@pytest.mark.parametrize("K", WORKERS)
@pytest.mark.parametrize("block", ["layer", 4])
@pytest.mark.parametrize("compressor", ["scaled_sign", "top_k"])
def test_dist_ef_in_gradient_units_is_error_feedback_in_parameter_units(compressor, block, K):
    for mu, lam in itertools.product([0.0, 0.9], [0.0, 0.05]):
        settings = ef(COMPRESSORS[compressor], block, mu, lam)
        dist_ef, *printed = drive(DistEF(settings, PROBLEM.x0, K), PROBLEM, LRS_POSITIVE)
        saef, *ours = run(settings, PROBLEM.x0, PROBLEM, LRS_POSITIVE, K)
        assert difference(printed[0], ours[0]) <= SAME and difference(printed[1], ours[1]) <= SAME, (mu, lam)
        errors = LRS_POSITIVE[-1] * torch.stack([dist_ef.e_tilde, *dist_ef.e])  # into parameter units
        apart = (errors - torch.stack([saef.e_server, *saef.e])).abs().max()
        assert apart <= SAME * saef.x.abs().max()  # they were rounded at the size of x


def test_the_units_differ_for_a_compressor_that_is_not_homogeneous():
    """sign(2 v) is not 2 sign(v): the equality above is about the compressor, and the comparison sees it."""
    settings = ef(sign)
    want = run(settings, PROBLEM.x0, PROBLEM, LRS_POSITIVE, 4)[1]
    assert difference(drive(DistEF(settings, PROBLEM.x0, 4), PROBLEM, LRS_POSITIVE)[1], want) > 1e-2


def test_dist_ef_refuses_what_it_does_not_have():
    with pytest.raises(ZeroDivisionError):
        drive(DistEF(ef(scaled_sign), PROBLEM.x0, 2), PROBLEM, LRS)
    for wrong in ({}, {"step_ahead": 0.0, "weight_decay_mode": "outer", "momentum": 0.9}):
        with pytest.raises(ValueError, match="Nesterov"):
            DistEF(Settings(**wrong), PROBLEM.x0, 2)


# --- 6. by hand ---------------------------------------------------------------------------------------------


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_compressors_by_hand():
    assert scaled_sign(vector(1, -3, 0, 4)).tolist() == [2, -2, 2, 2]
    assert sign(vector(-0.0, 0.0, -1e-300, 5)).tolist() == [1, 1, -1, 1]
    assert scaled_sign(vector(0, 0)).tolist() == [0, 0]
    assert top_k(0.5)(vector(1, -2, 2, 2, -1)).tolist() == [0, -2, 2, 2, 0]  # ceil(2.5) = 3
    assert top_k(0.4)(vector(1, -2, 2, 2, -1)).tolist() == [0, -2, 2, 0, 0]  # of three 2s, the two lowest
    assert top_k(0.001)(vector(3, 3)).tolist() == [3, 0]  # at least one
    assert top_k(1.0)(vector(3, 0, -1)).tolist() == [3, 0, -1]
    assert top_k(0.25)(vector(*[1, -1] * 2000)).tolist() == [1, -1] * 500 + [0, 0] * 1500
    assert identity(vector(3, -1)).tolist() == [3, -1]


def test_partition_by_hand():
    cut = lambda block: [(b.start, b.stop) for b in Partition((5, 1, 0, 4), block).blocks]  # noqa: E731
    assert cut("layer") == [(0, 5), (5, 6), (6, 10)]
    assert cut(2) == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10)]
    assert cut(100) == cut("layer")
    v = vector(1, 3, -2, -2, 7)
    assert blockwise(scaled_sign, Partition((4, 1), 2))(v).tolist() == [2, 2, -2, -2, 7]
    assert blockwise(scaled_sign, Partition((4, 1)))(v).tolist() == [2, 2, -2, -2, 7]
    assert blockwise(scaled_sign, Partition((5,)))(v).tolist() == [3, 3, -3, -3, 3]


def test_two_steps_of_algorithm_1_by_hand():
    """Binary fractions throughout, so that == is right."""
    saef = SAEF(Settings(scaled_sign, momentum=0.5, averaging=("allreduce", 2)), [vector(1, -2)], 2)
    saef.begin_step()
    saef.step([vector(4, -2), vector(2, 6)], 0.5)  # D_k = (2, -1), (1, 3); sent (1.5, -1.5), (2, 2)
    assert [e.tolist() for e in saef.e] == [[0.5, 0.5], [-1, 1]]
    assert saef.D.tolist() == [1.75, 0.25] and saef.R.tolist() == [1, 1]
    assert saef.e_server.tolist() == [0.75, -0.75]
    assert saef.x.tolist() == [0, -3] and saef.x_tilde().tolist() == [-0.5, -3]
    saef.begin_step()  # t + 1 = 2
    assert [e.tolist() for e in saef.e] == [[-0.25, 0.75]] * 2
    assert [saef.x_half(k)[0].tolist() for k in range(2)] == [[0.25, -3.75]] * 2
    saef.step([vector(0, 1), vector(2, -1)], 0.5)  # m_k = (2, 0), (3, 2); D_k = (.75, .75), (1.25, 1.75)
    assert [e.tolist() for e in saef.e] == [[0, 0], [-0.25, 0.25]]
    assert saef.D.tolist() == [1.875, 0.375] and saef.R.tolist() == [1.125, 1.125]
    assert saef.x.tolist() == [-1.125, -4.125]


def test_step_ahead_and_the_servers_own_compressor_by_hand():
    settings = Settings(identity, top_k(0.5), 2, step_ahead=0.5)
    saef = SAEF(settings, [vector(8, 8, 8, 8), torch.tensor(8.0)], 1)
    saef.e = [vector(1, 2, 3, 4, 5)]
    saef.begin_step()
    assert [p.tolist() for p in saef.x_half(0)] == [[7.5, 7, 6.5, 6], 5.5]
    saef.step([saef.zeros()], 0.5)  # D = D_1 = e_1; blocks of 2, 2 and 1 coordinates
    assert saef.R.tolist() == [0, 2, 0, 4, 5] and saef.e_server.tolist() == [1, 0, 3, 0, 0]
    assert saef.e[0].tolist() == [0] * 5 and saef.x.tolist() == [8, 6, 8, 4, 3]


@pytest.mark.parametrize("mu, nesterov, moves", [(0.0, False, (4, 2.75)), (0.5, False, (4, 4.75)),
                                                 (0.5, True, (6, 4.375))])  # fmt: skip
def test_outer_decay_by_hand(mu, nesterov, moves):
    """At the kept x = 16, not at x_half = 15, and by the gradient's own rule. Gradients are 0; R = 1, then 0.

    lambda x = 8, then 5.5 at x = 11 (4.5 at 9, Nesterov); m~ = 8, then 5.5, 9.5 or 8.5; eta = 1/2.
    """
    settings = Settings(momentum=mu, nesterov=nesterov, weight_decay=0.5, weight_decay_mode="outer")
    saef = SAEF(settings, [vector(16, 16)], 2)
    saef.e = [vector(1, 1), vector(1, 1)]
    for move in moves:
        saef.begin_step()
        saef.step([vector(0, 0)] * 2, 0.5)
        assert saef.outer.tolist() == [move, move]


def test_majority_vote_by_hand():
    vote = MajorityVote(Settings(weight_decay=0.5), [vector(2, 2, 2)], 2)
    vote.step([vector(3, -1, -5), vector(-1, -1, 0)], 0.25)  # signs + - -, - - +: a tie, -2, a tie
    assert vote.vote.tolist() == [1, -1, 1]
    assert vote.x.tolist() == [1.5, 2, 1.5]  # 2 - 0.25 (vote + 0.5 * 2)
    signum = MajorityVote(Settings(momentum=0.75), [vector(0)], 1)
    signum.step([vector(4)], 1.0)
    signum.step([vector(-2)], 1.0)  # m = 0.25 * 4 = 1, then 0.75 * 1 - 0.25 * 2 = 0.25: still +
    assert signum.m[0].tolist() == [0.25] and signum.x.tolist() == [-2]


def due(averaging, d, t):
    """The coordinates that begin_step averages at step t, found by trying."""
    saef = SAEF(Settings(averaging=averaging), [torch.zeros(d)], 2)
    before = [torch.arange(d) + 1.0, -torch.arange(d) - 3.0]
    saef.e, saef.t = [e.double() for e in before], t
    saef.begin_step()
    changed = [i for i in range(d) if saef.e[0][i] != before[0][i]]
    assert all(saef.e[k][i] == (-1 if i in changed else before[k][i]) for i in range(d) for k in range(2))
    return changed


def test_when_and_what_is_averaged():
    assert [t for t in range(10) if due(("allreduce", 3), 4, t) == [0, 1, 2, 3]] == [2, 5, 8]
    assert [due(("allreduce", 3), 4, t) for t in (0, 1, 3)] == [[], [], []]
    assert [due(("rotating", 3), 7, t) for t in range(4)] == [[0, 1], [2, 3], [4, 5, 6], [0, 1]]
    assert [due(("rotating", 5), 3, t) for t in range(6)] == [[], [0], [], [1], [2], []]  # p > d
    assert [due(("allreduce", 1), 3, t) + due(("rotating", 1), 3, t) for t in (0, 1)] == [[0, 1, 2] * 2] * 2
    assert due(None, 3, 0) == []


# --- 7. contraction -----------------------------------------------------------------------------------------


def test_l1_scale_contracts_and_l2_scale_does_not():
    """||C(v) - v||^2 / ||v||^2 is 1 - q^2 at the scale ||v||_1 / d, which is below 1 (dist-EF Proposition 1).

    At ||v||_2 / sqrt(d) it is 2 - 2 q, below 1 for q > 1/2 only. Here q = ||v||_1 / (sqrt(d) ||v||_2) <= 1.
    """
    gen = torch.Generator().manual_seed(0)
    dense = torch.randn(1000, dtype=torch.float64, generator=gen)
    sparse = dense * (torch.rand(1000, generator=gen) < 0.01)
    for v, l2_contracts in ((dense, True), (sparse, False)):
        q = (v.abs().sum() / (v.numel() ** 0.5 * v.norm())).item()
        error = lambda C_v, v=v: ((C_v - v).norm() ** 2 / v.norm() ** 2).item()  # noqa: E731
        assert error(scaled_sign(v)) == pytest.approx(1 - q**2, abs=1e-12) and error(scaled_sign(v)) < 1
        l2 = error(v.norm() / v.numel() ** 0.5 * sign(v))
        assert l2 == pytest.approx(2 - 2 * q, abs=1e-12) and (l2 < 1) == l2_contracts
        assert error(top_k(0.01)(v)) <= 1 - 0.01


# --- 8. wrong variants are caught ---------------------------------------------------------------------------


class MinusEta(SAEF):
    """D_k = e_k - eta m_k, SAEF eq. (24) as printed."""

    def corrected(self, k, eta):
        return self.e[k] - eta * self.u[k]


class Rescales(SAEF):
    """dist-EF's eta_{t-1} / eta_t on errors that are in parameter units already."""

    def corrected(self, k, eta):
        last, self.last = getattr(self, "last", eta), eta
        return last / eta * self.e[k] + eta * self.u[k]


class ForgetsWorkers(SAEF):
    """Drops the residuals of line 18."""

    def step(self, grads, lr):
        super().step(grads, lr)
        self.e = [self.zeros() for _ in self.e]


class ForgetsServer(SAEF):
    """Drops the residual of line 22."""

    def step(self, grads, lr):
        super().step(grads, lr)
        self.e_server = self.zeros()


class CastsAfterwards(SAEF):
    """Applies R in single precision, but has formed e from R itself."""

    def step(self, grads, lr):
        super().step(grads, lr)
        self.x = self.x + self.R - self.R.float()


class CopiesRankZero(SAEF):
    """Averages by broadcasting one worker's error: consensus, but another mean."""

    def begin_step(self):
        super().begin_step()
        self.e = [self.e[0]] * self.K


class DecaysAhead(SAEF):
    """Outer decay at x~ instead of the kept x."""

    def step(self, grads, lr):
        x, ahead = self.x, self.x_tilde()
        self.x = ahead
        super().step(grads, lr)
        self.x = self.x - ahead + x


WRONG = [MinusEta, Rescales, ForgetsWorkers, ForgetsServer, CastsAfterwards, CopiesRankZero, DecaysAhead]


@pytest.mark.parametrize("wrong", WRONG)
def test_invariant_catches(wrong):
    """Each by more than a thousand times what rounding may leave, where the right one stays below once."""
    settings = Settings(scaled_sign, momentum=0.9, weight_decay=0.05, weight_decay_mode="outer")
    assert violation(wrong(settings, PROBLEM.x0, 4), LRS_POSITIVE) > 1e3
    assert violation(SAEF(settings, PROBLEM.x0, 4), LRS_POSITIVE) <= 1


# --- misuse -------------------------------------------------------------------------------------------------


def test_misuse_is_refused():
    saef = SAEF(Settings(), PROBLEM.x0, 2)
    grads = [saef.zeros()] * 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="begin_step"):
            saef.step(grads, 0.1)
        saef.begin_step()
        saef.step(grads, 0.1)
    saef.begin_step()
    with pytest.raises(RuntimeError, match="2 gradients"):
        saef.step(grads[:1], 0.1)
    with pytest.raises(ValueError, match="19 coordinates"):
        saef.step([vector(1.0)] * 2, 0.1)
    with pytest.raises(KeyError):
        SAEF(Settings(weight_decay_mode="decoupled"), PROBLEM.x0, 2)


@pytest.mark.parametrize("algorithm", [SAEF, MomentumSGD])
def test_parameters_handed_out_are_copies(algorithm):
    workers = algorithm(Settings(), PROBLEM.x0, 2)
    for p in workers.x_half(0):
        p.fill_(7.0)
    assert torch.equal(workers.x, torch.cat([p.reshape(-1) for p in PROBLEM.x0]))


def test_drive_goes_on_where_it_stopped():
    settings = Settings(momentum=0.9, averaging=("allreduce", 5))
    saef, x, x_tilde = run(settings, PROBLEM.x0, PROBLEM, LRS, 2)
    part, x1, _ = run(settings, PROBLEM.x0, PROBLEM, LRS[:3], 2)
    same, x2, x_tilde2 = drive(part, PROBLEM, LRS[3:])
    assert same is part and part.t == saef.t == len(LRS)
    assert torch.equal(x, torch.cat([x1, x2[1:]])) and torch.equal(x_tilde[3:], x_tilde2)
