"""Scoring is refused before torch is imported, if the run cannot be scored."""

import json
import subprocess
import sys

import pytest

from pipeline.adapter.trained_on import TRAINED_ON, require_scorable
from pipeline.model.fingerprint import base_fingerprint
from pipeline.train.folder import write_run
from tests.messages import assert_mentions, refused
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor


def test_a_base_that_differs_in_one_byte_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    (tmp_path / "run/adapter").mkdir(parents=True)
    record = {"base": "org/name", "fingerprint": base_fingerprint(base).as_json()}
    (tmp_path / "run/adapter" / TRAINED_ON).write_text(json.dumps(record))
    settings = make_plan(base, eval_data=0.5).settings
    require_scorable(tmp_path / "run", settings)
    (shard,) = base.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with refused(base, "1 of", "model."):
        require_scorable(tmp_path / "run", settings)


def test_a_run_without_held_out_rows_is_refused_before_torch_is_imported(tmp_path):
    run = tmp_path / "run"
    write_run(run, make_plan(make_model(tmp_path / "base")), is_debug=False)
    (run / "adapter").mkdir()
    script = (
        "import sys\n"
        "from pipeline.cli.score import score\n"
        "from pipeline.errors import UserError\n"
        f"sys.argv = ['score.py', {str(run)!r}]\n"
        "try:\n"
        "    score()\n"
        "except UserError as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_mentions(result.stdout, run, "no eval_data", "False")
