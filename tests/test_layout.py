"""Each token's sequence for every layout, against a plain-Python reference."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_hf import NEFTuneError, sequence_layout
from neftune_hf.errors import NEFTuneWarning
from neftune_hf.layout import layout_of_call

from .helpers import CALLS, encodings, expected_layout, site, square_mask


def lengths(shape, **arguments):
    """L for each token of a batch of this shape."""
    return sequence_layout(torch.zeros(tuple(shape), dtype=torch.int64), **arguments).lengths


def lengths_of_call(given, ids, **facts):
    """L for each embedded id, in the shape of the ids."""
    return layout_of_call(given, ids, site(**facts)).lengths.reshape(ids.shape)


# Layouts that a mask, positions, cumulative lengths or a 4-dimensional mask can describe.
UNPACKED = (
    "unpadded", "right padding", "left padding", "padding on both sides", "a row of padding", "a single token",
)  # fmt: skip
PACKED = ("packed", "packed, one row of positions", "packed and padded", "documents of one token")
UNPADDED = ("unpadded", "packed", "packed, one row of positions", "documents of one token", "a single token")


def encoded(name, **options):
    ids, _, sequences = CALLS[name]
    return encodings(ids.shape, sequences, **options)


@pytest.mark.parametrize("name", UNPACKED + PACKED)
def test_lengths_by_a_mask_and_positions(name):
    known = encoded(name)
    found = lengths(known["mask"].shape, attention_mask=known["mask"], position_ids=known["positions"])
    assert found.tolist() == known["lengths"].tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("name", UNPACKED)
def test_lengths_by_a_mask_alone(name, dtype):
    known = encoded(name)
    found = lengths(known["mask"].shape, attention_mask=known["mask"].to(dtype))
    assert found.tolist() == known["lengths"].tolist()


@pytest.mark.parametrize("name", UNPADDED)
def test_lengths_by_positions_alone_and_by_cumulative_lengths_alone(name):
    known = encoded(name)
    for arguments in ({"position_ids": known["positions"]}, {"cu_seq_lens_q": known["cumulative lengths"]}):
        assert lengths(known["lengths"].shape, **arguments).tolist() == known["lengths"].tolist()


def test_lengths_by_cumulative_lengths_and_a_mask():
    bounds, mask = torch.tensor([0, 2, 5]), torch.tensor([[1, 1, 0, 1, 1, 0, 0]])  # padding inside and at the end
    found = lengths((1, 7), cu_seq_lens_q=bounds, attention_mask=mask)
    assert found.tolist() == [[2, 2, 0, 2, 2, 0, 0]]


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("name", UNPACKED + PACKED)
def test_lengths_by_a_4_dimensional_mask(name, causal, additive, with_positions):
    known = encoded(name, causal=causal)
    mask = known["4-dimensional mask"]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = known["positions"] if with_positions else None
    found = lengths(known["lengths"].shape, attention_mask=mask, position_ids=positions)
    assert found.tolist() == known["lengths"].tolist()


def test_positions_of_one_row_serve_the_batch():
    assert lengths((2, 3), position_ids=torch.tensor([[0, 1, 2]])).tolist() == [[3] * 3] * 2


def test_left_padding_with_any_positions_on_the_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    for positions in ([[0, 1, 2, 3, 4]], [[1, 1, 0, 1, 2]], [[0, 0, 0, 1, 2]]):
        found = lengths((1, 5), attention_mask=mask, position_ids=torch.tensor(positions))
        assert found.tolist() == [[0, 0, 3, 3, 3]]


def test_a_mask_wider_than_the_ids_and_one_narrower():
    wider = torch.tensor([[1, 1, 1, 1, 0]])  # preceded by two virtual or cached tokens
    assert lengths((1, 3), attention_mask=wider).tolist() == [[2, 2, 0]]
    narrower = torch.tensor([[1, 1, 0]])  # the model pads its ids to a window
    assert lengths((1, 5), attention_mask=narrower).tolist() == [[2, 2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 2), [[2, 3], [2, 3], [0, 3]]),  # time-major
        ((6,), [2, 2, 0, 3, 3, 3]),
        ((1, 2, 3), [[[2, 2, 0], [3, 3, 3]]]),
    ],
)
def test_ids_that_are_not_batch_by_length(shape, expected):
    given = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lengths_of_call(given, torch.zeros(shape, dtype=torch.int64), is_time_major=shape == (3, 2))
    assert found.tolist() == expected


def test_positions_of_ids_with_a_further_dimension():
    given = {"position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])}
    assert lengths_of_call(given, torch.zeros(1, 2, 3, dtype=torch.int64)).tolist() == [[[2, 2, 1], [3, 3, 3]]]


def test_a_time_major_batch_of_more_rows_than_columns():
    given = {"attention_mask": torch.tensor([[1, 0], [1, 1], [1, 1]])}
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert lengths_of_call(given, ids, is_time_major=True).tolist() == [[1, 2, 2], [0, 2, 2]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(None, [[2, 2, 0, 0]]), (torch.tensor([[1, 1, 1, 0]]), [[3, 3, 3, 0]])],
)
def test_labels_end_a_decoders_sequence_unless_there_is_a_mask(mask, expected):
    ids, labels = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[5, 6, -100, -100]])
    given = {"labels": labels, "attention_mask": mask}
    assert lengths_of_call(given, ids, pad_token_id=0, is_decoder=True).tolist() == expected


def test_a_decoders_padding_id_may_be_larger_than_the_others():
    ids = torch.tensor([[9, 5, 6, 9, 9]])  # shifted right; the start token is the padding id too
    assert lengths_of_call({}, ids, pad_token_id=9, is_decoder=True).tolist() == [[2, 2, 0, 0, 0]]


def test_a_square_batch_that_is_time_major():
    ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    given = {"attention_mask": mask, "input_ids": ids}
    assert lengths_of_call(given, ids).tolist() == [[2, 2], [1, 0]]
    assert lengths_of_call(given, ids.T, is_time_major=True).tolist() == [[2, 1], [2, 0]]


PLACED = [[9, 9, 5, 6, 7, 0]]  # 9 is an image placeholder; the last is padding


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.tensor([[1] * 5 + [0]])},
        {"attention_mask": torch.tensor([[1] * 5 + [0]]), "position_ids": torch.arange(6)[None]},
        {"attention_mask": torch.ones(6, 6).tril().bool()[None, None] & (torch.arange(6) < 5)},
    ],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_places_that_features_overwrite_do_not_count(given, replaced):
    ids = torch.tensor(PLACED)
    looked_up = ids.masked_fill(ids == 9, 0) if replaced else ids
    found = lengths_of_call(given | {"input_ids": ids}, looked_up, placeholders=(8, 9))
    assert found.tolist() == [[0, 0, 3, 3, 3, 0]]


@pytest.mark.parametrize(
    ("ids", "given", "documents"),
    [
        ([5, 6, 9, 9, 8, 4], {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])}, [[0, 1], [4, 5]]),
        ([9, 5, 9, 9, 6], {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, [[1], [4]]),
        ([5, 9, 9, 9, 6], {"attention_mask": square_mask(5, window=2)}, [[0, 4]]),
        ([5, 9, 6], {"cu_seq_lens_q": torch.tensor([0, 1, 3])}, [[0], [2]]),
        ([5, 9, 6], {"attention_mask": torch.tensor([[1, 2, 2]])}, [[0], [2]]),
    ],
)
def test_documents_that_begin_with_an_image_and_images_wider_than_a_window(ids, given, documents):
    ids = torch.tensor([ids])
    found = layout_of_call(given | {"input_ids": ids}, ids, site(placeholders=(9,)))
    expected = expected_layout(ids, [(0, columns) for columns in documents])
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("name", CALLS)
def test_layout_of_every_kind_of_call(name):
    ids, given, sequences = CALLS[name]
    expected = expected_layout(ids, sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = layout_of_call(given, ids, site())
    for part, reference in zip(found, expected, strict=True):
        assert part.dtype == torch.int64
        real = expected.lengths > 0
        assert torch.equal(part[real], reference[real])
        assert not part[~real].any()


def test_the_layout_of_an_empty_batch():
    for shape in ((0, 5), (2, 0)):
        assert sequence_layout(torch.zeros(shape, dtype=torch.int64)).lengths.shape == shape


def test_a_second_lookup_of_another_width_has_its_own_padding():
    """Chosen and rejected ids in one module: the mask has another shape, so padding is found by the pad token."""
    given = {"input_ids": torch.ones(2, 6), "attention_mask": torch.ones(2, 6)}
    other = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths_of_call(given, other, pad_token_id=0).tolist() == [[2, 2, 0, 0], [3, 3, 3, 0]]
        found = lengths_of_call(given, other, pad_token_id=0, placeholders=(9,))
        assert found.tolist() == [[2, 2, 0, 0], [2, 2, 0, 0]]
        positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
        found = lengths_of_call({"input_ids": torch.ones(2, 6), "position_ids": positions}, other)
        assert found.tolist() == [[2, 2, 2, 2], [4, 4, 4, 4]]
    padding = torch.zeros(2, 3, dtype=torch.int64)  # as LED pads to its window
    assert not lengths_of_call(given, padding, pad_token_id=0).any()


@pytest.mark.parametrize("labels", [[[5, -100, 6, 7, 1], [5, 6, 1, -100, -100]], [[5, 8, 6, 7, 1], [5, 6, 1, 0, 0]]])
def test_a_decoder_without_a_mask_has_the_lengths_of_its_labels(labels):
    """With the labels or, if the Trainer does not pass them on (label smoothing), with the ids shifted from them."""
    labels = torch.tensor(labels)
    inputs = torch.tensor([[0, 5, 8, 6, 7], [0, 5, 6, 1, 0]])
    expected = [[5] * 5, [3, 3, 3, 0, 0]]
    given = {"input_ids": inputs, "labels": labels.masked_fill(labels == 0, -100)}
    assert lengths_of_call(given, inputs, is_decoder=True, pad_token_id=0).tolist() == expected
    del given["labels"]
    assert lengths_of_call(given, inputs, is_decoder=True, pad_token_id=0).tolist() == expected
    of_whisper = inputs.masked_fill(inputs == 1, 0)  # the padding id is eos
    found = lengths_of_call({"input_ids": of_whisper}, of_whisper, is_decoder=True, pad_token_id=0, pad_is_eos=True)
    assert found.tolist() == expected


@pytest.mark.parametrize("given", [{}, {"attention_mask": {"full": 1}}, {"position_ids": torch.zeros(2, 2, 4)}])
def test_without_layout_arguments_the_length_is_the_width_with_a_warning(given):
    with pytest.warns(NEFTuneWarning, match="padded width"):
        assert lengths_of_call(given, torch.zeros(2, 4, dtype=torch.int64)).tolist() == [[4] * 4] * 2


FLAT = torch.tensor([5, 6, 7, 8, 9, 4, 3])


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 0])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 6, 7])},
        {"attention_mask": torch.tensor([1, 1, 1, 1, 2, 2, 3])},
    ],
)
def test_ids_of_one_dimension_have_the_documents_of_arguments_of_one_dimension(given):
    """As NeMo Automodel's THD layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths_of_call(given | {"input_ids": FLAT}, FLAT).tolist() == [4, 4, 4, 4, 2, 2, 1]


def test_positions_wider_than_the_ids_are_refused():
    """As where verl slices the ids over Ulysses ranks before the model, and passes the full positions."""
    given = {"input_ids": FLAT[None], "position_ids": torch.arange(14)[None]}
    with pytest.raises(NEFTuneError, match=r"`position_ids` have width 14: .*splits the sequences before the model"):
        lengths_of_call(given, FLAT[None])


# Rows for time, height and width. Two documents: text, an image of 2 x 2, text; an image of 1 x 2, text.
MROPE = torch.tensor([
    [[0, 1, 2, 2, 2, 2, 4, 5, 0, 0, 2]],
    [[0, 1, 2, 2, 3, 3, 4, 5, 0, 0, 2]],
    [[0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2]],
])  # fmt: skip


@pytest.mark.parametrize("form", ["3 rows", "4 rows", "3 rows, unpacked"])
def test_m_rope_separates_documents_beside_a_mask_of_ones(form):
    ids = torch.arange(3, 14)[None]
    positions = {
        "3 rows": MROPE,
        "4 rows": torch.cat([torch.tensor([[[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]]]), MROPE]),
        "3 rows, unpacked": MROPE + torch.tensor([0] * 8 + [6] * 3),
    }[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lengths_of_call({"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones(1, 11)}, ids)
    assert found.tolist() == [[11] * 11 if "unpacked" in form else [8] * 8 + [3] * 3]


def test_a_mask_for_each_kind_of_attention_that_masks_nothing_is_not_unknown():
    given = {"attention_mask": {"full_attention": None}, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths_of_call(given, torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[2] * 4]


def test_an_argument_of_unknown_form_is_named_even_if_another_is_known():
    given = {"attention_mask": torch.ones(2, 4), "position_ids": torch.zeros(2, 4, 2)}
    with pytest.warns(NEFTuneWarning, match=r"does not know the form of `position_ids` \(3-dimensional\)"):
        assert lengths_of_call(given, torch.zeros(2, 4, dtype=torch.int64)).tolist() == [[4] * 4] * 2


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations whose result the host must wait for: values, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "repeat_interleave", "_unique2", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = name in self.WAITS
        if name in ("index", "index_put", "index_put_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*CALLS, "labels"])
def test_no_layout_waits_for_the_device(name):
    if name == "labels":
        ids, given, about = torch.ones(2, 6, dtype=torch.long), {"labels": torch.ones(2, 6)}, {"is_decoder": True}
    else:
        (ids, given, _), about = CALLS[name], {}
    with NoSynchronisation():
        layout = layout_of_call(given, ids, site(**about))
    assert layout.lengths.shape == ids.shape


@pytest.mark.parametrize(
    "operation", [torch.Tensor.item, torch.Tensor.__bool__, torch.nonzero, torch.unique, lambda x: x[x > 0]]
)
def test_the_check_for_synchronisations_sees_one(operation):
    with NoSynchronisation(), pytest.raises(AssertionError, match="waits for the device"):
        operation(torch.ones(1))
