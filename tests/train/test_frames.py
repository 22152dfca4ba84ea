"""At most 8 stack frames of this project lie between `main()` and the forward pass.

So a traceback from the forward pass stays readable.
"""

import pytest
import yaml

from tests.commands import run
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]
MAX_FRAMES = 8
# launch/train.py, which also prints the functions on the stack at training's first forward pass.
CODE = """
import sys, traceback
sys.argv = ["train.py", sys.argv[1]]
from pipeline.cli.train import main
from pipeline.model.loss import SummedLoss

forward = SummedLoss.forward
def forward_with_report(*args, **kwargs):
    frames = [f for f in traceback.extract_stack() if "/pipeline/" in f.filename]
    names = [f.name for f in frames]
    # The checks of the model's class (model/proof.py), before training, also call forward.
    if "training_loop" in names and not hasattr(SummedLoss, "was_reported"):
        SummedLoss.was_reported = True
        print("FRAMES", *names[names.index("main"):])
    return forward(*args, **kwargs)
SummedLoss.forward = forward_with_report
main()
"""


def test_at_most_8_frames_are_between_main_and_the_forward_pass(tmp_path, tiny_model):
    run_file = tmp_path / "run.yaml"
    settings = {
        "model": str(tiny_model), "train_data": str(make_rows(tmp_path / "train.jsonl")),
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "max_length": 128, "lora_r": 8,
    }  # fmt: skip
    run_file.write_text(yaml.safe_dump(settings))
    code, output = run("-c", CODE, run_file)
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("FRAMES")]
    frames = line.split()[1:]
    assert frames[-1] == "_forward"
    assert len(frames) <= MAX_FRAMES, frames
