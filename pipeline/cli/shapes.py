"""Write published_shapes.json: layer sizes and parameter counts of published models.

They are derived from the model's class in transformers, which is built without weights.

python -m pipeline.cli.shapes [--check]

Needs torch and transformers and takes about a minute.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.cli.arguments import Parser
from pipeline.cluster.exits import run_main
from pipeline.errors import UserError
from pipeline.files import read_json, write_text
from pipeline.plan.given.published import SHAPES_FILE, PublishedModel, published_models


def shapes() -> None:
    """Write the file, or with `--check` compare it with the present classes."""
    parser = Parser("shapes", help_template=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 2 if stale")
    args = parser.parse_args()
    counted = {
        model.name: shape_by_class(model) for model in published_models() if model.needs_class
    }  # model name -> its shape
    if not args.check:
        write_text(SHAPES_FILE, shapes_text(counted))
        print(f"{SHAPES_FILE}: {len(counted)} shapes")
    elif read_json(SHAPES_FILE)["shapes"] != counted:
        raise UserError(
            f"{SHAPES_FILE}: differs from the shapes of the classes; run without --check"
        )


def shape_by_class(model: PublishedModel) -> dict[str, Any]:
    """The shape of a model, derived from its class; {"refused": REASON} if it cannot be trained."""
    from pipeline.model.class_shape import derive_shape  # imports torch and transformers

    # The sizes are those of the dequantised model, because training dequantises it.
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    # `counted_as`: the type to count instead if transformers has no class for the model's type.
    config["model_type"] = model.counted_as or config["model_type"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return derive_shape(Path(folder))
        except ValueError as error:
            return {"refused": str(error)}


def shapes_text(counted: dict[str, dict[str, Any]]) -> str:
    """JSON text with one line for each model, so that a diff shows which model changed.

    `counted`: model name -> its shape.
    """
    from importlib.metadata import version

    versions = json.dumps({name: version(name) for name in ("torch", "transformers")})
    lines = [f"{json.dumps(name)}: {json.dumps(shape)}" for name, shape in counted.items()]
    return f'{{"versions": {versions},\n"shapes": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(shapes)


if __name__ == "__main__":
    main()
