#!/usr/bin/env bash
# Packs what benchmarks/tensorrt_host.sh needs into .gpu/part-NN, each small enough for one transfer to the GPU host:
# CPython 3.10 with TensorRT 8.6.0 and the runtime's packages, and the artefacts. Takes about 15 minutes on 2 cores,
# most of it `xz -9` on TensorRT's kernels (990 MB to 322 MB), and 4 GB of disk below WORK.
#
#   benchmarks/tensorrt_pack.sh WORK DEMO SIZE VIT2
#     DEMO  an artefact of the demo with the plan int8 and its evaluation set (profile/sets)
#     SIZE  skeleton.py's strip of `vlmc export smolvlm-256m --random-weights` with the plan int8
#     VIT2  skeleton.py's strip of `tensorrt_variants.py make`
#
# Then, with demo/model moved aside (it would make each transfer too large), for every part in turn:
#   carry .gpu/part-NN, run `bash .gpu/part-NN/unpack.sh keep .gpu/part-NN`
# and with the last one `bash benchmarks/tensorrt_host.sh start`, with demo/model back `… measure SECONDS`.
# TensorRT checks its kernels' sha256, so nothing may be left out of them.
set -euo pipefail
work=$1 demo=$2 size=$3 vit2=$4
shared=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../shared/gpu" && pwd)
home=$(ls -d ~/.pyenv/versions/3.10.* | tail -1)
root=$work/pack site=$work/pack/py310/lib/python3.10/site-packages
mkdir -p "$root/py310/bin" "$site" "$root/data" "$work/wheels" .gpu
cp "$home/bin/python3.10" "$root/py310/bin/"
cp "$home"/lib/libpython3.10.so.1.0 "$root/py310/lib/" 2>/dev/null || true
tar -C "$home/lib" --exclude=test --exclude=idlelib --exclude=ensurepip --exclude=site-packages --exclude=__pycache__ \
  --exclude='config-3.10*' --exclude=tkinter --exclude=lib2to3 -cf - python3.10 | tar -C "$root/py310/lib" -xf -
packages="tensorrt==8.6.0 onnx-ir sympy mpmath ml-dtypes packaging rich pygments"
packages+=" $(sed 's/#.*//' "$shared/py310.txt" | tr '\n' ' ')"
for package in $packages; do # one by one, for pip would refuse the CPU-only resolution of TensorRT's needs
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.10 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform any -d "$work/wheels" "$package"
done
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
cp -r "$demo" "$root/data/demo" && cp -r "$size" "$root/data/256m" && cp -r "$vit2" "$root/data/vit2"
rm -rf "$root"/data/*/engines
xz -T0 -9 -c "$site/tensorrt/libnvinfer_builder_resource.so.8.6.0" | split -b 58M -d - "$work/res.xz."
rm "$site/tensorrt/libnvinfer_builder_resource.so.8.6.0"
tar -C "$root" -cf - . | xz -T0 -3 | split -b 58M -d - "$work/trt.part."
number=0
for file in "$work"/trt.part.* "$work"/res.xz.*; do
  part=.gpu/part-$(printf %02d "$number")
  mkdir -p "$part" && mv "$file" "$part/" && cp "$shared/unpack.sh" "$part/"
  number=$((number + 1))
done
du -sh .gpu/part-*
