"""models.saved.export: exported models give the run's scores without this program."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import eval as evaluation
from models import load_run
from tests.models.saved.conftest import Finished

AS_TIMM = ("linear_probe", "sdlora", "inflora")  # one ViT with a linear classifier
EXPORTS = {
    "timm": (*AS_TIMM, "sema"),
    "onnx": ("sema", "simplecil", "ranpac", "sdlora"),
    "torchscript": ("sema", "fecam", "aligned", "ease", "moal", "coda_prompt"),
}


def export(finished: Finished, form: str, out: Path) -> tuple[object, ...]:
    """The command that exports a run."""
    return evaluation.main, "--run", finished.folder, "--export", form, "--out", out


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in EXPORTS for name in EXPORTS[form]])
def test_an_export_gives_the_run_s_scores_as_its_card_says(
    name: str,
    form: str,
    runs: Callable[[str], Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., str],
) -> None:
    """The card's own lines, run on an image file of another size, and on more images at once."""
    if form == "onnx":
        for library in ("onnx", "onnxruntime"):
            pytest.importorskip(library, reason=f"{library} is not installed: requirements-export.txt")
    finished, out = runs(name), tmp_path / "made" / "model"
    if form == "timm" and name not in AS_TIMM:
        assert "possible: onnx, torchscript" in told(2, *export(finished, form, out))
        assert list(tmp_path.iterdir()) == []
        return
    shown = told(0, *export(finished, form, out))
    assert "differ from the run's by" in shown and "(0.0 " not in shown
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # as phones store photos that were taken upright
    Image.fromarray(finished.images[0]).resize((48, 40)).save("image.png", exif=turned)
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    found: dict[str, object] = {}
    exec(code.replace("FOLDER", str(out)), found)
    model = load_run(finished.folder, device="cpu")
    about = json.loads((out / "preprocessing.json").read_text())
    table = model.predict("image.png", top=len(model.classes)).set_index("class")["score"]
    with torch.no_grad():
        scores = found["model"](found["images"]).softmax(dim=1)
        many = found["model"](torch.cat([found["images"]] * 7)).softmax(dim=1)
    assert about["classes"] == model.classes and scores.shape == (1, len(model.classes))
    assert scores[0].detach().numpy() == pytest.approx(table[model.classes].to_numpy(), abs=1e-5)
    assert many.detach().numpy() == pytest.approx(np.repeat(scores.detach().numpy(), 7, axis=0), abs=1e-6)


def test_a_card_says_what_the_model_is_and_nothing_is_replaced(
    runs: Callable[[str], Finished], tmp_path: Path, told: Callable[..., str]
) -> None:
    finished = runs("sdlora")
    command = export(finished, "timm", tmp_path / "x")
    told(0, *command)
    card, model = (tmp_path / "x" / "README.md").read_text(), load_run(finished.folder)
    result = json.loads((finished.folder / "result.json").read_text())
    for fact in (
        "sdlora", "things.npz", "learned in 2 tasks", f"{result['curve'][-1]:.2f} %", "test_vit.random",
        "untrained", f"temperature {model.temperature:.4g}", ", ".join(model.classes),
    ):  # fmt: skip
        assert fact in card, fact
    before = sorted((tmp_path / "x").iterdir())
    assert "is there already" in told(2, *command) and sorted((tmp_path / "x").iterdir()) == before
