#!/bin/sh
# Installs the package into a fresh environment, as a user does, and tests it from outside the checkout, where the
# working directory can't stand in for a file that the wheel lacks.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
bin=$folder/venv/bin
"$bin/pip" install -q -c "$checkout/constraints.txt" setuptools wheel ninja numpy torch pytest hypothesis
# A copy of what is committed, so that the build leaves nothing in the checkout.
git -C "$checkout" archive HEAD | (mkdir "$folder/source" && tar -x -C "$folder/source")
"$bin/pip" install -q --no-build-isolation "$folder/source"
cp -r "$folder/source/tests" "$folder/tests"
rm -rf "$folder/source"
cd "$folder/tests"
"$bin/amn-kernels" info
"$bin/python" -m pytest -q -p no:cacheprovider --rootdir "$folder/tests" test_installed.py test_checks.py
"$bin/pip" install -q -c "$checkout/constraints.txt" "amn-kernels[train]"
cd "$folder"
"$bin/amn-kernels" train --epochs 1 --batch-size 512 --lambda-info 0.5 --out "$folder/run" > /dev/null
"$bin/amn-kernels" evaluate "$folder/run"
