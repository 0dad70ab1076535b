"""Figures of quality are what they are called, computed again here in float64 or by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr

from pifa_compile.errors import InputError
from pifa_compile.evaluation import (
    embed,
    neighbour_agreement,
    next_tokens,
    perplexity,
    sentence_batches,
    similarity,
    windows_of,
)


class Tokenizer:
    """One token per character; special tokens are 1 and 2, padding is 0."""

    def __call__(self, text, add_special_tokens=True, return_tensors=None, verbose=True, **settings):
        rows = [[ord(c) for c in t] for t in ([text] if isinstance(text, str) else text)]
        if add_special_tokens:
            rows = [[1, *row, 2] for row in rows]
        if settings.get("truncation"):
            rows = [row[: settings["max_length"]] for row in rows]
        width = settings["max_length"] if settings.get("padding") == "max_length" else max(map(len, rows))
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        rows = [row + [0] * (width - len(row)) for row in rows]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def test_windows_follow_each_other_without_special_tokens():
    windows = windows_of("abcdefghijk", Tokenizer(), length=4)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abcd", "efgh"]
    assert windows.dtype == torch.int64
    assert windows_of("abcdefghijkl", Tokenizer(), length=4, most=1).tolist() == windows[:1].tolist()
    assert windows_of("abcdefghijkl", Tokenizer(), length=4, most=9).shape == (3, 4)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="the text has 3 tokens, less than one window of 4; give a longer one"):
        windows_of("abc", Tokenizer(), length=4)


def language_model(vocabulary=11, seed=0):
    """Logits that depend on the token alone, and the calls that were made."""
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
    calls = []

    def model(ids):
        calls.append(ids.shape[0])
        return SimpleNamespace(logits=table[ids].bfloat16())

    return model, table.bfloat16().double(), calls


@pytest.mark.parametrize(("count", "batch", "counted", "calls"), [(4, 8, 4, [4]), (7, 3, 6, [3, 3]), (6, 3, 6, [3, 3])])
def test_perplexity_is_the_exponential_of_the_mean_loss(count, batch, counted, calls):
    """Over all tokens but the first of each window; a last, smaller batch of several is dropped."""
    windows = torch.randint(11, (count, 9))
    model, table, made = language_model()
    losses = [-table[a].log_softmax(0)[b] for row in windows[:counted] for a, b in itertools.pairwise(row)]
    assert perplexity(model, windows, batch) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert made == calls


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    uniform = lambda ids: SimpleNamespace(logits=torch.zeros(*ids.shape, 50))  # noqa: E731
    assert perplexity(uniform, torch.randint(50, (3, 5))) == pytest.approx(50)


def test_next_tokens_scores_every_window_and_tells_the_likeliest_tokens():
    windows = torch.randint(11, (7, 9))
    model, table, made = language_model()
    losses = [-table[a].log_softmax(0)[b] for row in windows for a, b in itertools.pairwise(row)]
    found = next_tokens(model, windows, batch=3)
    assert found.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found.choices.tolist() == [[int(table[a].argmax()) for a in row[:-1]] for row in windows]
    assert made == [3, 3, 1]


def test_sentence_batches_have_one_shape():
    batches = sentence_batches(["ab", "abcdefgh", "c", "d", "e"], Tokenizer(), batch=2, length=6)
    assert [b["input_ids"].shape for b in batches] == [(2, 6)] * 2
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batches[1]["input_ids"][0].tolist() == [1, ord("c"), 2, 0, 0, 0]


def test_embeddings_are_unit_means_over_the_tokens_that_count():
    batches = sentence_batches(["ab", "abcde", "c", "d"], Tokenizer(), batch=2, length=6)
    table = torch.randn(200, 8, dtype=torch.float64)
    found = embed(lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=table[input_ids]), batches)
    for row, tokens in zip(found, [[1, 97, 98, 2], [1, 97, 98, 99, 100, 101], [1, 99, 2], [1, 100, 2]], strict=True):
        mean = table[tokens].mean(0)
        torch.testing.assert_close(row.double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_similarity_compares_embeddings_and_the_order_of_their_pairs():
    unit = torch.nn.functional.normalize
    dense, compressed = unit(torch.randn(6, 8), dim=1), unit(torch.randn(6, 8), dim=1)
    found = similarity(dense, compressed)
    cosines = [float(a.double() @ b.double()) for a, b in zip(dense, compressed, strict=True)]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    orders = [[float(e[i].double() @ e[j].double()) for i, j in pairs] for e in (dense, compressed)]
    wanted = {
        "mean_cosine": sum(cosines) / 6,
        "worst_cosine": min(cosines),
        "rank_correlation": spearmanr(*orders).statistic,
    }
    assert found == pytest.approx(wanted, abs=1e-6)
    assert similarity(dense, dense) == pytest.approx(dict.fromkeys(wanted, 1.0), abs=1e-6)


def test_neighbours_agree_where_the_nearest_other_sentence_is_the_same():
    unit = torch.nn.functional.normalize
    dense, compressed = unit(torch.randn(9, 4), dim=1), unit(torch.randn(9, 4), dim=1)
    nearest = [
        [max((j for j in range(9) if j != i), key=lambda j: float(e[i].double() @ e[j].double())) for i in range(9)]
        for e in (dense, compressed)
    ]
    same = sum(a == b for a, b in zip(*nearest, strict=True))
    assert 0 < same < 9, "these embeddings decide nothing"
    assert neighbour_agreement(dense, compressed) == pytest.approx(same / 9)
    assert neighbour_agreement(dense, dense) == 1
