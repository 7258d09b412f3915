"""The formula against an independent float64 loop, the bits against plain-Python integers, and their statistics."""

import functools
import math
import operator

import numpy
import pytest
import torch
from scipy import stats

from neftune_hf import add_noise
from neftune_hf.errors import NEFTuneConfigError
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import NOISE_TYPES, noise_key, random_words, rounding_snr_db, scheduled_alpha, unit_noise

M32, M64, GOLDEN = 2**32 - 1, 2**64 - 1, 0x9E3779B97F4A7C15


def mix32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16)


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def reference_hash(ids: list[int]) -> int:
    """The hash of a sequence, computed with unsigned Python integers."""
    return sum(mix64((i + (position << 32) + GOLDEN) & M64) for position, i in enumerate(ids)) & M64


def reference_word(key: int, sequence_hash: int, position: int, channel: int) -> int:
    """The random word of one element."""
    sequence_key = mix64((sequence_hash ^ key) & M64)
    token = mix64((sequence_key + (position + 1) * GOLDEN) & M64)
    x = ((token & M32) + mix32(channel)) & M32
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (token >> 32)) & M32
    return ((x ^ (x >> 15)) * 0x846CA68B) & M32


def reference_u(word: int, noise_type: str) -> float:
    signed = word - 2**32 if word >> 31 else word
    uniform = ((signed >> 7) | 1) / 2**24
    return NOISE_TYPES[noise_type](torch.tensor(uniform, dtype=torch.float64)).item()


def random_layout(*shape, seed=0):
    """A layout in which each row is a sequence."""
    ids = torch.randint(0, 50_000, shape, generator=torch.Generator().manual_seed(seed))
    return sequence_layout(ids)


@pytest.mark.parametrize("d", [1, 5, 8, 31])
@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_words_equal_python_integers(d, key):
    rows = [[7, 8, 9], [0, 0, 0], [2**31 - 1, 1, 250_000]]
    words = random_words(sequence_layout(torch.tensor(rows)), d, key)
    expected = [
        [[reference_word(key & M64, reference_hash(row), t, j) for j in range(d)] for t in range(3)] for row in rows
    ]
    assert (words.long() & M32).tolist() == expected


def test_golden_words_never_change():
    """Golden values: as long as they hold, a published run can be replayed from its seed."""
    key = noise_key(seed=42, step=1000, embedding=1)
    assert key == -8040536459676882159
    assert random_words(sequence_layout(torch.tensor([[3, 5]])), 4, key).flatten().tolist() == [
        655009856, 388690261, 824069636, 1887924932, 1336249551, -1008476315, 1457539941, 1255906685,
    ]  # fmt: skip


def test_key_depends_on_every_part():
    seeds, steps = (0, 1, 2**40, 2**64 - 1), (*range(50), 2**40, 2**63)
    keys = {noise_key(seed, step, i) for seed in seeds for step in steps for i in range(3)}
    assert len(keys) == len(seeds) * len(steps) * 3
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [0, 1, 1, 0]], [[1, 1, 1, 0], [0, 0, 0, 0]]])
def test_add_noise_equals_float64_reference(noise_type, dtype, mask):
    torch.manual_seed(0)
    d, alpha, key = 5, 7.5, noise_key(3)
    ids = torch.randint(0, 100, (2, 4))
    e = torch.randn(2, 4, d).to(dtype).requires_grad_()
    noisy = add_noise(e, sequence_layout(ids, torch.tensor(mask)), alpha, key, noise_type)
    assert noisy.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 2.0**-23)
    ulps = 1.01 if noise_type == "uniform" else 4  # a function such as torch's erfinv is accurate to a few ulps
    for b in range(2):
        real = [ids[b, t].item() for t in range(4) if mask[b][t]]
        for t in range(4):
            position = sum(mask[b][:t])
            for j in range(d):
                word = reference_word(key & M64, reference_hash(real), position, j)
                noise = alpha / math.sqrt(len(real) * d) * reference_u(word, noise_type) if mask[b][t] else 0.0
                exact = e[b, t, j].item() + noise
                assert abs(noisy[b, t, j].item() - exact) <= ulps * eps * max(1, abs(exact), abs(noise))
                if not mask[b][t]:
                    assert noisy[b, t, j].item() == e[b, t, j].item()
    noisy.double().square().sum().backward()
    torch.testing.assert_close(e.grad, (2 * noisy.detach().double()).to(dtype))


def test_an_unknown_noise_type_is_refused_by_name():
    with pytest.raises(NEFTuneConfigError, match=f"{', '.join(map(repr, NOISE_TYPES))}, got 'cauchy'"):
        add_noise(torch.zeros(1, 1, 2), random_layout(1, 1), 5.0, 1, "cauchy")


@functools.cache
def every_u(noise_type):
    """u of each of the 2^24 uniform numbers, in their order."""
    return unit_noise(torch.arange(-(2**23), 2**23, dtype=torch.int32) << 8, noise_type)


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_every_type_is_symmetric_with_variance_one_third(noise_type):
    u = every_u(noise_type)
    assert torch.equal(u, -u.flip(0))
    assert bool((u.diff() >= 0).all())
    assert u.double().square().mean().item() == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("noise_type", "distribution"),
    [("uniform", stats.uniform(-1, 2)), ("gaussian", stats.norm(scale=3**-0.5))],
)
def test_the_types_are_the_distributions_of_their_names(noise_type, distribution):
    u = every_u(noise_type)[:: 2**10].double()
    shares = (torch.arange(len(u)).double() + 2**-11) / len(u)
    torch.testing.assert_close(u, torch.from_numpy(distribution.ppf(shares.numpy())), rtol=1e-5, atol=2e-7)


def test_bernoulli_noise_has_two_values():
    assert every_u("bernoulli").unique().tolist() == pytest.approx([-(3**-0.5), 3**-0.5])


def unit_noise_of(rows, width, d, seed=0, key=None, noise_type="uniform"):
    """u of a batch of random sequences, (rows * width, d)."""
    words = random_words(random_layout(rows, width, seed=seed), d, noise_key(1) if key is None else key)
    return unit_noise(words, noise_type).flatten(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_moments_over_ten_million_draws(noise_type):
    u = unit_noise_of(20, 128, 4096, noise_type=noise_type).double()
    population, n = every_u(noise_type).double(), u.numel()
    assert n > 1e7
    for power in (1, 2, 3, 4):
        expected, variance = population.pow(power).mean(), population.pow(power).var()
        assert abs(u.pow(power).mean() - expected) <= 4.5 * (variance / n).sqrt() + 1e-7, power


def test_ten_million_draws_are_uniform():
    u = unit_noise_of(20, 128, 4096)
    assert stats.kstest(u.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_noise_is_unbiased(dtype):
    e = torch.zeros(1, 2048, 4096, dtype=dtype)
    noise = add_noise(e, random_layout(1, 2048), 5.0, noise_key(9)).double()
    assert abs(noise.mean() / (noise.std() / math.sqrt(noise.numel()))) < 4.5


def z(*factors):
    """The mean of a product of independent draws, divided by its standard error."""
    product = math.prod(factors)
    return (product.mean(dtype=torch.float64) * math.sqrt(3 ** len(factors) * product.numel())).item()


def z_of_sum(first, *others):
    """The same for cos(pi * (first - sum of others)), which is 1 if the first is the sum of the others modulo 2."""
    turns = first - sum(others)
    return (torch.cos(math.pi * turns).mean(dtype=torch.float64) * math.sqrt(2 * turns.numel())).item()


# Lags at which the outputs of additive and XOR generators depend on each other (Knuth; Ziff 1998).
TAPS = [(5, 17), (24, 55), (37, 100), (103, 250), (38, 89, 61, 127), (471, 1586, 6988, 9689)]


def dependence(u):
    """z-scores of products of draws from one batch, (tokens, channels): standard normal if they are independent.

    The three or five outputs at its lags expose a lagged-Fibonacci generator, rows that repeat at a shift expose a pool
    that is read at random offsets, and the corners of rectangles expose a hash of (row + column).
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
    # rows against each other at every shift: the maximum, converted back to one standard normal score
    rows = u[:64].double()
    spectrum = torch.fft.rfft(rows, 2 * rows.shape[1])
    pairs = torch.triu_indices(64, 64, offset=1)
    cross = torch.fft.irfft(spectrum[pairs[0]] * spectrum[pairs[1]].conj(), 2 * rows.shape[1])
    largest = cross.abs().max().item() * 3 / math.sqrt(rows.shape[1])
    scores.append(stats.norm.isf(min(1.0, cross.numel() * 2 * stats.norm.sf(largest))))
    return torch.tensor(scores)


def is_independent(scores):
    return bool(scores.abs()[scores.isfinite()].max() < 4.8 and not (scores == math.inf).any())


@pytest.mark.slow
def test_draws_are_independent():
    u = unit_noise_of(40, 64, 4096)
    assert u.numel() > 1e7
    scores = dependence(u)
    assert is_independent(scores), scores
    assert 0.8 < scores[:-1].std() < 1.2


def test_steps_embeddings_seeds_and_sequences_are_independent():
    u = unit_noise_of(40, 64, 4096)
    keys = [noise_key(1, step=1), noise_key(1, step=2**32), noise_key(1, embedding=1), noise_key(2), noise_key(2**32)]
    scores = [z(u, unit_noise_of(40, 64, 4096, key=key)) for key in keys]
    scores.append(z(u, unit_noise_of(40, 64, 4096, seed=1)))
    assert max(map(abs, scores)) < 4.5


def test_records_that_share_a_prefix_do_not_share_its_noise():
    """A system prompt, or that of a chosen and a rejected completion: the hash covers the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 1000, (1, 60), generator=generator).expand(64, 60)
    records = torch.cat([prompt, torch.randint(0, 1000, (64, 4), generator=generator)], dim=1)
    u = unit_noise(random_words(sequence_layout(records), 512, noise_key(1)))[:, :60]
    for shift in (1, 2, 7, 31):
        assert abs(z(u, u.roll(shift, 0))) < 4.5
    completion_of_one_token = torch.tensor([[*range(20), 5], [*range(20), 6]])
    chosen, rejected = unit_noise(random_words(sequence_layout(completion_of_one_token), 4096, noise_key(1)))
    assert abs(z(chosen, rejected)) < 4.5


def test_equal_sequences_of_a_step_have_equal_noise():
    """The documented price of noise that is a function of the sequence."""
    words = random_words(sequence_layout(torch.tensor([[5, 6, 7], [5, 6, 7], [7, 6, 5]])), 8, 1)
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2].flip(0))


def lagged(n, taps, combine):
    """The words of a lagged generator that combines its outputs at distances `taps`."""
    x = torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(0))
    for start in range(max(taps), n, min(taps)):
        end = min(start + min(taps), n)
        x[start:end] = functools.reduce(combine, (x[start - tap : end - tap] for tap in taps)) % 2**32
    return (x - 2**31).to(torch.int32)


@pytest.mark.slow
def test_the_test_of_independence_sees_bad_generators():
    pool = torch.rand(2**16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    offsets = torch.randint(0, 2**16 - 1024, (1024,), generator=torch.Generator().manual_seed(1))
    assert not is_independent(dependence(torch.stack([pool[start : start + 1024] for start in offsets])))
    for taps in TAPS:
        for combine in (operator.add, operator.xor):
            words = lagged(1024 * 256, taps, combine).view(1024, 256)
            assert not is_independent(dependence(unit_noise(words)))
    assert is_independent(dependence(torch.rand(1024, 1024, generator=torch.Generator().manual_seed(2)) * 2 - 1))


def test_pairs_of_neighbouring_draws_are_uniform():
    u = unit_noise_of(20, 128, 4096, seed=11)
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        cells = ((first + 1) * 16).long() * 32 + ((second + 1) * 16).long()
        counts = torch.bincount(cells.flatten(), minlength=1024)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_alpha_by_schedule(schedule):
    values = [scheduled_alpha(10.0, schedule, step, 100) for step in range(101)]
    assert values[0] == 10.0
    if schedule == "constant":
        assert set(values) == {10.0}
    else:
        assert values == sorted(values, reverse=True)
        assert values[25] == pytest.approx(7.5 if schedule == "linear" else 5 + 5 * 0.5**0.5)
        assert values[50] == pytest.approx(5.0)
        assert values[100] == pytest.approx(0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1.4, 1.9])
def test_the_rms_of_rounding(scale, dtype):
    numbers = scale * torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (numbers.to(dtype).double() - numbers).square().mean().sqrt().item()
    rms = numbers.square().mean().sqrt().item()
    assert rounding_snr_db(dtype) == pytest.approx(20 * math.log10(rms / error), abs=0.1)


def test_noise_within_half_a_unit_in_the_last_place_is_lost():
    """Uniform noise with that RMS changes no number of magnitude 1.5, and twice as much noise does."""
    numbers, unit = torch.full((1000,), 1.5, dtype=torch.bfloat16), torch.linspace(-1, 1, 1000) * math.sqrt(3)
    rms = 1.5 * 10 ** (-rounding_snr_db(torch.bfloat16) / 20)
    assert torch.equal((numbers.float() + 0.9 * rms * unit).bfloat16(), numbers)
    assert not torch.equal((numbers.float() + 2 * rms * unit).bfloat16(), numbers)


def test_a_key_takes_numpys_integers():
    steps = numpy.arange(999, 1002)
    assert [noise_key(numpy.uint64(2**64 - 1), step) for step in steps] == [noise_key(2**64 - 1, int(s)) for s in steps]
