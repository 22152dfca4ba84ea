"""LoftQ: the initial A and B correct the errors of the 4-bit base at each ZeRO stage.

The published adapter is therefore only right on that 4-bit base.
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import replace_lora_weights_loftq
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.initial import initial_adapter_of, require_startable
from pipeline.adapter.merge_plan import TrainedBase
from pipeline.adapter.publish import publish_adapter
from pipeline.adapter.trained_on import (
    corrected_base,
    corrects_quantisation,
    require_corrected_base,
)
from pipeline.files import read_json
from pipeline.model import loftq
from pipeline.model.adapter import frozen_checksum, lora_config
from pipeline.model.base import _quantization, load_plain
from pipeline.model.fingerprint import base_fingerprint
from pipeline.plan.given.shape import read_shape
from pipeline.train import assemble
from pipeline.train.engine import Engine
from tests.adapter.merged import merge_adapter
from tests.messages import assert_mentions, refused
from tests.ranks import run_ranks
from tests.tiny import make_model, make_plan
from tests.train_tiny import assert_stages_equal_and_resumes_exact, build_engine, three_steps

pytestmark = pytest.mark.engine

IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared
LOFTQ = {
    "init_lora_weights": "loftq", "load_in_4bit": True, "rank_pattern": {"q_proj": 2},
    "use_rslora": True, "lr": 1e-2, "batch_size": 2,
}  # fmt: skip
# Name -> settings, and whether the run resumes from the checkpoint of "zero2" after a step.
RUNS = {
    "zero1": ({"zero_stage": 1}, False),
    "zero2": ({"zero_stage": 2}, False),
    "zero3": ({"zero_stage": 3}, False),
    "zero2 resumed": ({"zero_stage": 2}, True),
    "zero3 resumed": ({"zero_stage": 3}, True),
}


def train_at_each_stage(session, folder):
    """Train the runs of RUNS; results by name, and the checksum of a base without LoftQ."""
    runs = {}
    _, plain = build_engine(session, folder, {"load_in_4bit": True, "zero_stage": 2})
    checksum_without_loftq = frozen_checksum(plain.deepspeed.module)
    for name, (settings, is_resumed) in RUNS.items():
        plan = make_plan(folder, 2, 40, **LOFTQ, **settings)
        if is_resumed:
            assemble.correct_quantisation = None  # an SVD would raise an error
        model, _ = assemble.build_model(plan, session, folder if is_resumed else None)
        engine = Engine(model, plan)
        result = {"initial": gather_weights(engine.parameters, keep=True)}
        state = runs["zero2"]["state"] if is_resumed else None
        result |= three_steps(session, plan, engine, state)
        if name == "zero2":
            result["checksum"] = frozen_checksum(engine.deepspeed.module)
            engine.deepspeed.eval()
            with torch.no_grad():
                result["logits"] = engine.deepspeed.module.model(input_ids=IDS).logits
        runs[name] = result
    return runs, checksum_without_loftq


@pytest.fixture(scope="module")
def trained_on_two_ranks(tmp_path_factory):
    """The folder of the base, and the results of `train_at_each_stage`."""
    folder = tmp_path_factory.mktemp("loftq")
    base = make_model(folder / "base")
    return base, *run_ranks(train_at_each_stage, base, tmp_path=folder)[0]


@pytest.fixture(scope="module")
def trained(trained_on_two_ranks, tmp_path_factory):
    """The plan at ZeRO-2, the runs, and the folders of the base and of the adapter of "zero2"."""
    base, runs, _ = trained_on_two_ranks
    folder = tmp_path_factory.mktemp("published")
    plan = make_plan(base, 2, 40, zero_stage=2, **LOFTQ)
    adapter = folder / "adapter"
    publish_adapter(plan, runs["zero2"]["final"], adapter, step=3, base=base_fingerprint(base))
    return plan, runs, base, adapter


def peft_model(plan, base, **options):
    """The 4-bit base with an adapter that peft attaches."""
    config = _quantization(plan.settings, read_shape(str(base)), torch.float32)
    model = load_plain(
        base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    lora = LoraConfig(r=4, target_modules=plan.settings.lora_target_modules, **options)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def test_without_a_scaling_the_initial_matrices_are_those_of_peft(tmp_path, monkeypatch):
    """peft's LoftQ ignores the scaling alpha / r, so the two agree only if it is 1."""
    base = make_model(tmp_path / "base")
    settings = LOFTQ | {"use_rslora": False, "lora_alpha": 4.0, "rank_pattern": {}}
    plan = make_plan(base, **settings)
    model = peft_model(plan, base, lora_alpha=4)
    original_to = torch.Tensor.to

    def to_cpu_instead_of_cuda(tensor, *args, **options):
        device = {"device": "cpu"} if options.get("device") == "cuda" else {}
        return original_to(tensor, *args, **options | device)

    # peft's function moves tensors to CUDA, which this test does not need.
    monkeypatch.setattr(torch.Tensor, "to", to_cpu_instead_of_cuda)
    replace_lora_weights_loftq(model, str(base / "model.safetensors"))
    errors = loftq._QuantisationErrors(plan, torch.device("cpu"))
    for layer in loftq.adapted_layers(plan.shape, plan.settings):
        module = model.get_submodule(f"base_model.model.{layer.name}")
        a, b = loftq.low_rank_factors(errors.of(layer.name), layer)
        for matrix, by_peft in ((a, module.lora_A["default"]), (b, module.lora_B["default"])):
            torch.testing.assert_close(matrix, by_peft.weight.data, rtol=1e-5, atol=1e-7)


def test_the_product_of_the_initial_matrices_is_the_nearest_correction_of_each_weight(trained):
    plan, runs, base, _ = trained
    model, initial = peft_model(plan, base), runs["zero2"]["initial"]
    for layer in loftq.adapted_layers(plan.shape, plan.settings):
        module = model.get_submodule(f"base_model.model.{layer.name}").base_layer
        assert isinstance(module, Linear4bit)
        weight = load_file(base / "model.safetensors")[f"{layer.name}.weight"]
        error = weight - dequantised(module)
        key = f"base_model.model.{layer.name}"
        a, b = initial[f"{key}.lora_A.weight"], initial[f"{key}.lora_B.weight"]
        assert a.shape[0] == layer.r
        remainder = torch.linalg.norm(error - layer.scaling * (b @ a))
        # No product of rank r leaves less than the singular values after the first r.
        singular_values = torch.linalg.svdvals(error)
        assert remainder == pytest.approx(float(singular_values[layer.r :].norm()), rel=1e-4)


def dequantised(module):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def test_the_base_in_memory_is_that_of_a_run_without_loftq(trained_on_two_ranks):
    _, runs, checksum_without_loftq = trained_on_two_ranks
    assert runs["zero2"]["checksum"] == checksum_without_loftq


def test_stages_are_equal_and_a_resumed_run_needs_no_second_svd(trained):
    _, runs, *_ = trained
    assert_stages_equal_and_resumes_exact(runs)


def test_the_merge_onto_the_4_bit_weights_has_the_outputs_of_training(trained, tmp_path):
    plan, runs, base, adapter = trained
    assert read_json(adapter / "adapter_config.json")["init_lora_weights"] is True
    merge_adapter(base, adapter, tmp_path / "merged", onto=TrainedBase(plan.settings, "float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, runs["zero2"]["logits"], rtol=1e-4, atol=1e-4)


def test_the_adapter_is_refused_on_a_base_without_the_corrected_errors(trained, tmp_path):
    plan, _, base, adapter = trained
    assert corrects_quantisation(adapter)
    require_corrected_base(adapter, plan.settings, "")
    other = plan.settings.model_copy(update={"bnb_4bit_quant_type": "fp4"})
    for settings in (None, other):
        with refused("load_in_4bit: true", "nf4", "loftq.yaml"):
            require_corrected_base(adapter, settings, "name loftq.yaml")
    unquantised = {"init_adapter": str(adapter), "rank_pattern": LOFTQ["rank_pattern"]}
    with refused("init_adapter", "load_in_4bit: true"):
        require_startable(make_plan(base, use_rslora=True, **unquantised))


def test_a_run_that_starts_from_the_adapter_inherits_the_corrected_base(trained, tmp_path):
    _, runs, base, adapter = trained
    settings = LOFTQ | {"init_adapter": str(adapter), "init_lora_weights": True}
    plan = make_plan(base, 2, 40, zero_stage=2, **settings)
    require_startable(plan)
    assert initial_adapter_of(tmp_path, plan.settings)["corrects_quantised_base"]
    weights = runs["zero2"]["final"]
    publish_adapter(plan, weights, tmp_path / "second", step=3, base=base_fingerprint(base))
    assert corrects_quantisation(tmp_path / "second")
    card = (tmp_path / "second/README.md").read_text()
    assert_mentions(card, "BitsAndBytesConfig(load_in_4bit=True", "vllm serve MERGED")


def test_a_loftq_run_from_an_adapter_without_correction_does_not_correct_the_base(tmp_path):
    """Else the trained adapter would be merged onto the 4-bit base, which it does not correct."""
    plan = make_plan(make_model(tmp_path / "base"), **LOFTQ, init_adapter="other")
    assert corrected_base(plan.settings, None) is None
    assert lora_config(plan.settings).init_lora_weights is True
    assert plan.decompositions is None
