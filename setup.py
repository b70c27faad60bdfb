import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent

version = next(
    line.split('"')[1]
    for line in (HERE / "src/diffusers_disback/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

found = re.search(r"""^repository-code: ["']?([^"'\s]+)""", (HERE / "CITATION.cff").read_text(), re.M)
repository = found and found[1].rstrip("/")


def long_description(readme: str, repository: str | None) -> str:
    """A README for readers elsewhere: relative links lead to the repository at this version; while it has no address, only
    their text is kept."""

    def absolute(link: re.Match) -> str:
        image, text, target = link.groups()
        if repository is None:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)", absolute, readme)


extras = {
    "train": ["datasets>=3.0", "peft>=0.18", "tensorboard", "Jinja2"],
    "eval": ["torchmetrics>=1.4", "matplotlib>=3.9", "scipy"],
    "completion": ["shtab>=1.7"],
    "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "latex2mathml>=3.77"],
    "bitsandbytes": ["bitsandbytes>=0.50"],
    "demo": ["gradio>=6.31,<7"],
    "trackio": ["trackio>=0.43"],
    "xformers": ["xformers>=0.0.30; platform_system == 'Linux' and platform_machine == 'x86_64'"],
}
extras["dev"] = [
    *(*extras["train"], *extras["eval"], *extras["bitsandbytes"], *extras["completion"], *extras["demo"]),
    *(*extras["trackio"], *extras["docs"]),
    *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.150", "markdown-it-py>=3", "ruff>=0.6", "build", "twine"),
    "playwright>=1.50",
    *("mypy>=1.15", "types-psutil", "types-PyYAML", "types-tqdm"),
]

setup(
    name="diffusers-disback",
    version=version,
    description="One-step text-to-image generators from any diffusers teacher, by distribution backtracking (DisBack).",
    long_description=long_description((HERE / "README.md").read_text(), repository),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The diffusers-disback authors",
    keywords="diffusion distillation diffusers text-to-image one-step score-distillation",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"": ["templates/*.md"], "diffusers_disback": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.40,<0.44",
        "transformers>=5.0",
        "accelerate>=1.10",
        "safetensors>=0.8",
        "huggingface-hub>=1.23",
        "PyYAML",
        "numpy>=2.0",
        "psutil",
        "tqdm",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["diffusers-disback=diffusers_disback.commands.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
