#!/usr/bin/env bash
# Pins and hashes the workspace's environment; needs uv. The files name no index, and hashes cover x86_64 and aarch64.
# What is pinned already stays, unless an argument says otherwise: `compile.sh --upgrade`, `--upgrade-package NAME`.
# basic-pitch is taken for the model in its wheel, without its dependencies (TensorFlow among them).
set -euo pipefail
cd "$(dirname "$0")"
options=(--quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo 'basic-pitch==0.4.0' >"$work/models.in"
uv pip compile "${options[@]}" --no-deps --python-version 3.11 "$work/models.in" -o "$work/models.txt"
sed -e '/^tflite-runtime/d' -e 's/^numpy<2/numpy>=2/' workspace.in >"$work/workspace-3.12.in"
cp workspace.in "$work/workspace-3.11.in"
for version in 3.11 3.12; do
    for platform in x86_64-manylinux_2_36 aarch64-manylinux_2_36; do
        cp "python-$version.txt" "$work/$platform.txt"
        uv pip compile "${options[@]}" --python-version "$version" --python-platform "$platform" \
            "$work/workspace-$version.in" -o "$work/$platform.txt"
    done
    diff "$work/x86_64-manylinux_2_36.txt" "$work/aarch64-manylinux_2_36.txt"
    cat "$work/x86_64-manylinux_2_36.txt" "$work/models.txt" >"python-$version.txt"
done
echo 'pip-audit' >"$work/audit.in"  # in an environment of its own: `make audit`
uv pip compile "${options[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_36 "$work/audit.in" -o audit.txt
