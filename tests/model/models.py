"""Models of the kinds of kinds.py with random weights, and a model with its own code."""

from tests.model.kinds import KINDS


def build(name, dtype=None, kinds=KINDS):
    """A model of a kind; its random weights are so large that scales and soft caps matter."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind, keys = kinds[name]
    config = AutoConfig.for_model(kind, **keys)
    auto = AutoModelForImageTextToText  # the class of checkpoints with a vision tower
    if type(config) not in auto._model_mapping:
        auto = AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).to(dtype or torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(std=0.12)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output
"""


def make_own_code(folder):
    """A model folder with its own model class, which `trust_remote_code` loads."""
    import json

    build("llama").save_pretrained(folder)
    (folder / "own_code.py").write_text(OWN_CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def cache_shape(folder):
    """Read the model shape of a folder from its class, and write it to the cache of class_shape.py.

    It is read in this process. class_shape.py would start another, which needs 3 s for its imports.
    """
    import json

    from pipeline.model.class_shape import shape_or_reason
    from pipeline.plan.given.class_shape import shape_file

    path = shape_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shape_or_reason(folder)), encoding="utf-8")
