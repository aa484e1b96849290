"""Packaging of hf-gradmem. Lower bounds are the versions that the fast tests were run with; constraints.txt pins the
set that the whole suite was run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hf_gradmem" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="hf-gradmem",
    version=VERSION,
    description="GradMem for Transformers: write a context into memory tokens by gradient descent, answer from them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_gradmem", "hf_gradmem.*", "hf_gradmem_cli"]),
    package_data={"hf_gradmem": ["checkpoint/model_card_template.md", "pretrained/*/*", "py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        "transformers>=5.20",
        "peft>=0.19",
        "accelerate>=1.13",
        "huggingface-hub>=1.31",
        "evaluate>=0.4.6",
        "datasets>=5.2",
        "jinja2>=3.1",
        "safetensors>=0.8",
        "numpy>=2.4",
        "pyyaml>=6.0",
        "tqdm>=4.70",
        "typer>=0.29",
        "rich>=15.0",
    ],
    extras_require={
        "chat": ["prompt_toolkit>=3.0.53"],
        "docs": ["mkdocs>=1.6", "mkdocs-jupyter>=0.26", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
        "plots": ["matplotlib>=3.11"],
        "search": ["bm25s>=0.3.16"],
        "serve": ["fastapi>=0.165", "uvicorn>=0.54"],
        "test": [
            "bm25s>=0.3.16",
            "fastapi>=0.165",
            "httpx>=0.28",
            "ipykernel>=7.4",
            "matplotlib>=3.11",
            "mypy>=2.4",
            "nbformat>=5.11",
            "nbmake>=1.5",
            "openai>=3.57",
            "pexpect>=4.9",
            "prompt_toolkit>=3.0.53",
            "pytest>=9.2",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "setuptools>=77",
            "types-PyYAML>=6.0.12",
            "types-tqdm>=4.70",
            "uvicorn>=0.54",
        ],
        "notebooks": ["ipykernel>=7.4", "jupyterlab", "matplotlib>=3.11", "nbclient>=0.11", "nbformat>=5.11"],
    },
    entry_points={"console_scripts": ["hf-gradmem=hf_gradmem_cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
