"""NEFTune's noise is bounded by the length of each document, and added only in training."""

import pytest
import torch
from torch import nn

from pipeline.model.neftune import EmbeddingNoise

pytestmark = pytest.mark.tensor

ALPHA, HIDDEN = 5.0, 32
DOCUMENTS = ((4, 16), (20,), (9,))  # tokens of each document in three rows of 20, with padding


def noise(seed=0, *, training=True):
    """The noise that is added to the embeddings of DOCUMENTS."""
    embeddings = nn.Embedding(50, HIDDEN).train(training)
    ids = torch.arange(60).reshape(3, 20) % 50
    plain = embeddings(ids)
    hook = EmbeddingNoise(embeddings, ALPHA)
    hook.documents = DOCUMENTS
    torch.manual_seed(seed)
    return (embeddings(ids) - plain).detach()


def test_the_bound_depends_on_the_document_and_padding_has_no_noise():
    added = noise().abs()
    for row, span, tokens in (
        (0, slice(0, 4), 4),
        (0, slice(4, 20), 16),
        (1, slice(0, 20), 20),
        (2, slice(0, 9), 9),
    ):
        bound = ALPHA / (tokens * HIDDEN) ** 0.5
        assert 0.9 * bound < added[row, span].max() < 1.001 * bound
    assert not added[2, 9:].any()


def test_the_noise_follows_the_seed_and_is_off_in_evaluation():
    torch.testing.assert_close(noise(1), noise(1), atol=1e-6, rtol=0)
    assert not torch.allclose(noise(1), noise(2), atol=1e-3)
    assert not noise(training=False).any()
