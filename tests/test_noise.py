"""The formula against an independent float64 loop, the bits against plain-Python integers, and their statistics."""

import functools
import math
import operator

import pytest
import torch
from scipy import stats

from neftune_hf import add_noise
from neftune_hf.noise import noise_key, random_words, scheduled_alpha, unit_noise

M32, M64 = 2**32 - 1, 2**64 - 1


def mix32(x: int, last_shift: bool = True) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16) if last_shift else x


def splitmix_output(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def reference_word(key: int, call: int, token: int, channel: int) -> int:
    """The word of one element in unsigned Python integers."""
    call_key = splitmix_output((key + call * 0x9E3779B97F4A7C15) & M64)
    k0, k1 = call_key & M32, call_key >> 32
    row = mix32(mix32(token ^ k0) ^ k1)
    column = mix32((mix32(channel ^ k1) + k0) & M32)
    return mix32((row + column) & M32, last_shift=False)


def reference_u(word: int, noise_type: str) -> float:
    signed = word - 2**32 if word >> 31 else word
    u = ((signed >> 7) | 1) / 2**24
    return {"uniform": u, "gaussian": stats.norm.ppf((u + 1) / 2), "bernoulli": math.copysign(1.0, u)}[noise_type]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 17, 8), (3, 1, 31), (7, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_words_equal_python_integers(shape, key):
    words = random_words(key, 3, shape).flatten().tolist()
    d = shape[-1]
    expected = [reference_word(key, 3, i // d, i % d) for i in range(math.prod(shape))]
    assert [word & M32 for word in words] == expected


def test_golden_words_never_change():
    """A published run can be replayed from its seed for as long as these hold."""
    key = noise_key(seed=42, rank=1, step=1000, site=1)
    assert key == -8893946391037756546
    assert random_words(key, 2, (2, 4)).flatten().tolist() == [
        -368716536,
        536595948,
        -1005076560,
        951579706,
        -394868433,
        112766112,
        1533146514,
        776408773,
    ]


def test_key_depends_on_every_part():
    keys = {
        noise_key(s, r, t, i) for s in (0, 1, 2**40, 2**64 - 1) for r in range(4) for t in range(50) for i in range(3)
    }
    assert len(keys) == 4 * 4 * 50 * 3
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("noise_type", ["uniform", "gaussian", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lengths", [[[4, 4, 4, 4], [0, 2, 2, 0]], [[1, 3, 3, 3], [0, 0, 0, 0]]])
def test_add_noise_equals_float64_reference(noise_type, dtype, lengths):
    torch.manual_seed(0)
    d, alpha, key, call = 5, 7.5, noise_key(3), 2
    e = torch.randn(2, 4, d).to(dtype).requires_grad_()
    noisy = add_noise(e, torch.tensor(lengths), alpha, key, call, noise_type)
    assert noisy.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 2.0**-23)
    ulps = 4 if noise_type == "gaussian" else 1.01  # torch's erfinv is good to a few units in the last place
    for b in range(2):
        for t in range(4):
            for j in range(d):
                length = lengths[b][t]
                u = reference_u(reference_word(key, call, b * 4 + t, j), noise_type)
                noise = alpha / math.sqrt(length * d) * u if length else 0.0
                exact = e[b, t, j].item() + noise
                assert abs(noisy[b, t, j].item() - exact) <= ulps * eps * max(1, abs(exact), abs(noise))
                if not length:
                    assert noisy[b, t, j].item() == e[b, t, j].item()
    noisy.double().square().sum().backward()
    torch.testing.assert_close(e.grad, (2 * noisy.detach().double()).to(dtype))


MOMENTS = {"uniform": (1 / 3, 1 / 5, 1 / 9), "gaussian": (1, 3, 105), "bernoulli": (1, 1, 1)}


@pytest.mark.parametrize("noise_type", list(MOMENTS))
def test_moments_over_ten_million_draws(noise_type):
    u = unit_noise(random_words(noise_key(5), 1, (2560, 4096)), noise_type).double()
    second, fourth, eighth = MOMENTS[noise_type]
    n = u.numel()
    assert n > 1e7
    assert abs(u.mean()) < 4.5 * math.sqrt(second / n)
    assert abs(u.pow(3).mean()) < 4.5 * math.sqrt({"uniform": 1 / 7, "gaussian": 15, "bernoulli": 1}[noise_type] / n)
    assert abs(u.square().mean() - second) <= 4.5 * math.sqrt((fourth - second**2) / n) + 1e-12
    assert abs(u.pow(4).mean() - fourth) <= 4.5 * math.sqrt((eighth - fourth**2) / n) + 1e-12
    if noise_type != "bernoulli":
        cdf = stats.uniform(-1, 2).cdf if noise_type == "uniform" else stats.norm.cdf
        assert stats.kstest(u.flatten().numpy(), cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_noise_is_unbiased(dtype):
    e = torch.zeros(1, 2048, 4096, dtype=dtype)
    noise = add_noise(e, torch.full((1, 2048), 2048), 5.0, noise_key(9)).double()
    assert abs(noise.mean() / (noise.std() / math.sqrt(noise.numel()))) < 4.5


def z(*factors):
    """The mean of a product of independent draws, in its own standard deviations."""
    product = math.prod(factors)
    return (product.mean(dtype=torch.float64) * math.sqrt(3 ** len(factors) * product.numel())).item()


def z_of_sum(first, *others):
    """The same for cos(pi * (first - sum of others)): one where the first is their sum modulo 2, as u is."""
    turns = first - sum(others)
    return (torch.cos(math.pi * turns).mean(dtype=torch.float64) * math.sqrt(2 * turns.numel())).item()


# Lags at which the outputs of additive and of exclusive-or generators depend on each other (Knuth; Ziff 1998).
TAPS = [(5, 17), (24, 55), (37, 100), (103, 250), (38, 89, 61, 127), (471, 1586, 6988, 9689)]


def dependence(u):
    """Scores of products of draws of one batch, (tokens, channels): standard normal if they are independent.

    A lagged-Fibonacci generator is exposed by the three or five outputs at its lags, a pool that is read at random
    offsets by rows that repeat at a shift, a hash of (row + column) by the corners of rectangles.
    """
    scores = [z(u[:, :-lag], u[:, lag:]) for lag in range(1, 65)] + [z(u[:-lag], u[lag:]) for lag in range(1, 65)]
    scores += [z(u[:, : -2 * i], u[:, i:-i], u[:, 2 * i :]) for i in range(1, 9)]
    flat = u.flatten()[: 2**21]
    for taps in TAPS:
        longest = max(taps)
        tapped = [flat[longest:], *(flat[longest - tap : len(flat) - tap] for tap in taps)]
        signs = math.prod(x.sign() for x in tapped)
        scores += [z_of_sum(*tapped), (signs.mean(dtype=torch.float64) * math.sqrt(signs.numel())).item()]
    for i in (1, 2, 7, 64):
        for j in (1, 2, 7, 64):
            scores.append(z(u[:-i, :-j], u[:-i, j:], u[i:, :-j], u[i:, j:]))
    # rows against each other at every shift: the largest of many, brought back to one standard normal score
    rows = u[:64].double()
    spectrum = torch.fft.rfft(rows, 2 * rows.shape[1])
    pairs = torch.triu_indices(64, 64, offset=1)
    cross = torch.fft.irfft(spectrum[pairs[0]] * spectrum[pairs[1]].conj(), 2 * rows.shape[1])
    largest = cross.abs().max().item() * 3 / math.sqrt(rows.shape[1])
    scores.append(stats.norm.isf(min(1.0, cross.numel() * 2 * stats.norm.sf(largest))))
    return torch.tensor(scores)


def is_independent(scores):
    return bool(scores.abs()[scores.isfinite()].max() < 4.8 and not (scores == math.inf).any())


def test_draws_are_independent():
    u = unit_noise(random_words(noise_key(1), 0, (2560, 4096)))
    assert u.numel() > 1e7
    scores = dependence(u)
    assert is_independent(scores), scores
    assert 0.8 < scores[:-1].std() < 1.2


def test_calls_steps_ranks_sites_and_seeds_are_independent():
    shape = (2560, 4096)
    u = unit_noise(random_words(noise_key(1), 0, shape))
    others = [noise_key(1, rank=1), noise_key(1, step=1), noise_key(1, site=1), noise_key(2)]
    scores = [z(u, unit_noise(random_words(key, 0, shape))) for key in others]
    scores.append(z(u, unit_noise(random_words(noise_key(1), 1, shape))))
    assert max(map(abs, scores)) < 4.5


def lagged(n, taps, combine):
    """The words of a generator that combines its outputs `taps` ago."""
    x = torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(0))
    for start in range(max(taps), n, min(taps)):
        end = min(start + min(taps), n)
        x[start:end] = functools.reduce(combine, (x[start - tap : end - tap] for tap in taps)) % 2**32
    return (x - 2**31).to(torch.int32)


def test_the_test_of_independence_sees_bad_generators():
    pool = torch.rand(2**16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    offsets = torch.randint(0, 2**16 - 1024, (1024,), generator=torch.Generator().manual_seed(1))
    assert not is_independent(dependence(torch.stack([pool[start : start + 1024] for start in offsets])))
    for taps in TAPS:
        for combine in (operator.add, operator.xor):
            words = lagged(1024 * 256, taps, combine).view(1024, 256)
            assert not is_independent(dependence(unit_noise(words)))
    assert is_independent(dependence(torch.rand(1024, 1024, generator=torch.Generator().manual_seed(2)) * 2 - 1))


def test_pairs_are_uniform():
    u = unit_noise(random_words(noise_key(11), 0, (2560, 4096)))
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        cells = ((first + 1) * 16).long() * 32 + ((second + 1) * 16).long()
        counts = torch.bincount(cells.flatten(), minlength=1024)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule):
    values = [scheduled_alpha(10.0, schedule, step, 100) for step in range(101)]
    assert values[0] == 10.0
    if schedule == "constant":
        assert set(values) == {10.0}
    else:
        assert values == sorted(values, reverse=True)
        assert values[50] == pytest.approx(5.0)
        assert values[100] == pytest.approx(0.0)
