#!/bin/sh
# Builds sdist and wheels as for a release, into dist/, and tests them installed, from outside the checkout, where the
# working directory can't stand in for a file that a wheel lacks.
#
#   PYTHON         makes the fresh environment in which all is built and tested first
#   INTERPRETERS   further ones to test in, each with torch, numpy, setuptools, ninja, pytest and hypothesis: beside the
#                  same minor version of torch the wheel as it is, beside another one a wheel built there from the sdist
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source" "$folder/sdist"
"${PYTHON:-python3}" -m venv "$folder/venv"
bin=$folder/venv/bin
"$bin/pip" install -q -c "$checkout/constraints.txt" setuptools wheel ninja numpy torch pytest hypothesis build abi3audit

# The sdist is made of what is committed, and the wheels of the sdist: what it lacks is missed here.
git -C "$checkout" archive HEAD | tar -x -C "$folder/source"
"$bin/python" -m build -q --no-isolation --sdist -o "$folder/dist" "$folder/source"
tar -x -z -f "$folder"/dist/*.tar.gz -C "$folder/sdist" --strip-components 1
AMN_EXT=0 "$bin/python" -m build -q --no-isolation --wheel -o "$folder/dist" "$folder/sdist"
rm -rf "$folder/sdist/build"
"$bin/python" -m build -q --no-isolation --wheel -o "$folder/dist" "$folder/sdist"
"$bin/abi3audit" --strict "$folder"/dist/*-abi3-*.whl
cp -r "$folder/source/tests" "$folder/tests"
cd "$folder/tests"

test_installed() { # interpreter, tests
    interpreter=$1
    shift
    "$interpreter" -m pytest -q -p no:cacheprovider --rootdir "$folder/tests" "$@"
}

echo "== without compiled code"
"$bin/pip" install -q --no-deps "$folder"/dist/*-none-any.whl
"$bin/amn-kernels" info
AMN_EXT=0 test_installed "$bin/python" test_installed.py
"$bin/pip" uninstall -q -y amn-kernels

echo "== as most people install it"
"$bin/pip" install -q -c "$checkout/constraints.txt" "$(echo "$folder"/dist/*-abi3-*.whl)[train]"
"$bin/amn-kernels" info
test_installed "$bin/python" test_installed.py test_checks.py
"$bin/amn-kernels" train --epochs 1 --batch-size 512 --lambda-info 0.5 --out "$folder/run" > /dev/null
"$bin/amn-kernels" evaluate "$folder/run"

minor() { "$1" -c "import sys, torch; print('.'.join(torch.__version__.split('.')[:2]))"; }
for interpreter in ${INTERPRETERS:-}; do
    echo "== $("$interpreter" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)")"
    rm -rf "$folder/site" "$folder/other"
    "$interpreter" -m pip install -q --no-deps --target "$folder/site" "$folder"/dist/*-abi3-*.whl
    if [ "$(minor "$interpreter")" != "$(minor "$bin/python")" ]; then
        # Not loaded, and explained: another torch than it was compiled for.
        PYTHONPATH=$folder/site "$interpreter" -m amn_kernels.cli info | grep "compiled for torch"
        AMN_EXT=0 PYTHONPATH=$folder/site test_installed "$interpreter" test_installed.py
        "$interpreter" -m pip wheel -q --no-build-isolation --no-deps -w "$folder/other" "$folder"/dist/*.tar.gz
        rm -rf "$folder/site"
        "$interpreter" -m pip install -q --no-deps --target "$folder/site" "$folder"/other/*.whl
    fi
    PYTHONPATH=$folder/site test_installed "$interpreter" test_installed.py test_checks.py
done

mkdir -p "$checkout/dist"
cp "$folder"/dist/* "$checkout/dist"
ls -l "$checkout/dist"
