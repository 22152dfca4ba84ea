"""No attention implementation attends across the documents of a pack on a GPU."""

from importlib.util import find_spec

import pytest
import torch

from pipeline.model.attention import FLASH, WITHIN_DOCUMENTS
from tests.gpu.test_memory import needs_gpu
from tests.model.test_attention import (
    FAMILIES,
    WINDOW,
    assert_alone,
    assert_nothing_leaks,
    is_dense,
    load,
    make,
)

# Heads of 32 elements, as flash-attn needs a larger head than the other tests have.
FLASH_FAMILIES = [("llama", {"head_dim": 32}), ("gemma2", {"head_dim": 32} | WINDOW)]


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), [family for family in FAMILIES if is_dense(family)])
def test_no_document_of_a_pack_affects_another(tmp_path, kind, change):
    folder = make(tmp_path, kind, change, "bfloat16")
    assert_nothing_leaks(load(folder, dtype="bfloat16").cuda())


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), FAMILIES)
def test_a_document_of_a_pack_has_the_logits_that_it_has_alone(tmp_path, kind, change):
    folder = make(tmp_path, kind, change)
    assert_alone(load(folder).cuda(), load(folder, "eager").cuda(), 1e-3)


@needs_gpu
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs the package flash-attn")
@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), FLASH_FAMILIES)
def test_flash_attention_does_not_attend_across_documents(tmp_path, kind, change):
    folder = make(tmp_path, kind, change, "bfloat16")
    flash, default = (load(folder, name, "bfloat16").cuda() for name in (FLASH, WITHIN_DOCUMENTS))
    assert_nothing_leaks(flash)
    assert_alone(flash, default, 0.1)
