# Every recipe prepares the environment it needs: the active conda environment if d2l is installed
# in it, otherwise .venv, which is made on first use and installed again when a pin has changed.

set positional-arguments
set shell := ["bash", "-euo", "pipefail", "-c"]

home := justfile_directory()
shared := parent_directory(home) / "shared"
conda := env("CONDA_PREFIX", home / "no-conda")
in_conda := path_exists(conda / "bin/d2l")
venv := if in_conda == "true" { conda } else { env("D2L_VENV", home / ".venv") }
python := quote(venv / "bin/python")
fingerprint := sha256(home + sha256_file("pyproject.toml") + sha256_file("kernels/pyproject.toml") + sha256_file("constraints.txt"))

# reference and real data, for the tests that compare with them
export D2L_GOLDEN_DIR := env("D2L_GOLDEN_DIR", if path_exists(shared / "reference/golden") == "true" { shared / "reference/golden" } else { "" })
export D2L_DATA_DIR := env("D2L_DATA_DIR", if path_exists(shared / "data") == "true" { shared / "data" } else { "" })

# List the recipes
[private]
default:
    @{{ quote(just_executable()) }} --list --unsorted

# Reproduce a figure or table: just reproduce fig2 --scale tiny
reproduce *args: _setup
    @{{ python }} -m d2l reproduce "$@"

# Train the hypernetwork of a figure: just train fig2 --scale tiny
train *args: _setup
    @{{ python }} -m d2l train "$@"

# List what can be reproduced, at what cost, and how its claims stand
figures *args: _setup
    @{{ python }} -m d2l figures "$@"

# Judge the committed results against the papers' claims
claims *args: _setup
    @{{ python }} -m d2l claims "$@"

# Measure: just bench (internalising), just bench kernels, just bench segmented_lora (idle machine)
bench *args: _setup
    #!/usr/bin/env bash
    set -euo pipefail
    case "${1:-}" in
        kernels | segmented_lora | cross_attention | latent_attention | topk_distill)
            {{ python }} -m d2l_kernels.bench "$@" ;;
        *) {{ python }} -m d2l bench "$@" ;;
    esac

# All tests of the kernels, and the faults that they must notice
test-kernels *args: _setup
    @OMP_NUM_THREADS=1 {{ python }} -m pytest --numprocesses=auto tests/kernels kernels/d2l_kernels "$@"
    @OMP_NUM_THREADS=1 {{ python }} tests/support/mutate_kernels.py

# Write questions about Wikipedia, as those that ship (a GPU: minutes): just write-questions OUT.jsonl.gz
write-questions *args: _setup
    @{{ python }} -m d2l.question_writing "$@"

# Open the notebooks in JupyterLab
lab *args: _setup
    @{{ python }} -m jupyterlab notebooks "$@"

# Run the tests: just test -m 'not slow'
test *args: _setup
    @OMP_NUM_THREADS=1 {{ python }} -m pytest --numprocesses=auto --dist=loadfile "$@"

# Use the notebooks in JupyterLab in a real Chromium (skipped without one); pictures in build/lab
test-lab *args: _setup
    @D2L_TEST_LAB=1 OMP_NUM_THREADS=1 {{ python }} -m pytest tests/lab "$@"

# Check style and format
lint: _setup
    @{{ python }} -m ruff check
    @{{ python }} -m ruff format --check

# Check types
types: _setup
    @{{ python }} -m pyright --pythonpath {{ python }}

# Format the code and strip the notebooks' outputs
fmt: _setup
    @{{ python }} -m ruff check --fix-only
    @{{ python }} -m ruff format
    @{{ python }} -m jupyter nbconvert --clear-output --inplace notebooks/*.ipynb

# Run every notebook at smoke scale, executed copies under build/notebooks
notebooks: _setup
    @{{ python }} -m d2l notebooks

# Everything that guards the main branch
ci: lint types notebooks test-lab test

_setup:
    #!/usr/bin/env bash
    set -euo pipefail
    if {{ in_conda }}; then exit; fi
    stamp={{ quote(venv / "d2l-setup") }}
    if [[ -f $stamp && $(< "$stamp") == {{ fingerprint }} ]]; then exit; fi
    rm -f "$stamp"
    if ! {{ python }} -m pip --version > /dev/null 2>&1; then
        chosen=
        for candidate in "${D2L_PYTHON:-}" python3.11 python3; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
                chosen=$candidate
                break
            fi
        done
        if [[ -z $chosen ]]; then
            echo "d2l needs Python 3.11 or newer, found: $(python3 --version 2>&1 || true)." >&2
            echo "Install it, or name one: D2L_PYTHON=/path/to/python just ..." >&2
            exit 1
        fi
        "$chosen" -m venv $([[ -f {{ quote(venv / "pyvenv.cfg") }} ]] && echo --clear) {{ quote(venv) }}
    fi
    echo "Installing the pinned packages into {{ venv }} (once; torch is a large download)"
    {{ python }} -m pip install $([[ -t 1 ]] || echo --quiet) -c constraints.txt -e ./kernels -e '.[dev,lab,documents]'
    echo {{ fingerprint }} > "$stamp"
