#!/usr/bin/env bash
# Packs what benchmarks/gpu_host.py needs into .gpu/part-NN, each small enough for one transfer to the GPU host of
# shared/gpu/README.md, which reaches no registry. WORK needs 4 GB of disk and keeps what was packed for the next time.
#
#   benchmarks/gpu_pack.sh trt WORK            CPython 3.10, TensorRT 8.6.0 and the runtime's packages (15 minutes on
#                                              2 cores: `xz -9` takes TensorRT's kernels from 990 MB to 322)
#   benchmarks/gpu_pack.sh ort WORK            onnxruntime-gpu for the host's own Python 3.12
#   benchmarks/gpu_pack.sh data WORK PRESET…   skeletons of these, which are exported and calibrated first; a model of
#                                              4 billion weights takes 12 minutes, 19 GB of memory and 17 of disk
#   benchmarks/gpu_pack.sh sketch WORK PRESET… the graphs of these models' decoders alone, of any size in 20 to 60 s and
#                                              0.7 GB, beside what `data` packed
#   benchmarks/gpu_pack.sh parts WORK          all that was packed, in parts
#
# Then, with demo/model's *.safetensors moved aside (they would make each transfer too large), for every part in turn:
#   carry .gpu/part-NN, run `bash .gpu/part-NN/unpack.sh keep .gpu/part-NN`
# TensorRT checks its kernels' sha256, so nothing may be left out of them.
set -euo pipefail
what=$1 work=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
shared=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../shared/gpu" && pwd)
part=${PART:-57M}

wheels() { # PYTHON FOLDER PACKAGE…: one by one, for pip would refuse the CPU-only resolution of what they need
  local python=$1 folder=$2 package && shift 2
  for package in "$@"; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d "$folder" "$package" 2>/dev/null
  done
}

case $what in
  trt)
    site=$work/trt/py310/lib/python3.10/site-packages resource=libnvinfer_builder_resource.so.8.6.0
    home=$(ls -d ~/.pyenv/versions/3.10.* | tail -1)
    mkdir -p "$work/trt/py310/bin" "$site"
    cp "$home/bin/python3.10" "$work/trt/py310/bin/"
    cp "$home"/lib/libpython3.10.so.1.0 "$work/trt/py310/lib/" 2>/dev/null || true
    tar -C "$home/lib" --exclude=test --exclude=idlelib --exclude=ensurepip --exclude=site-packages \
      --exclude=__pycache__ --exclude='config-3.10*' --exclude=tkinter --exclude=lib2to3 -cf - python3.10 |
      tar -C "$work/trt/py310/lib" -xf -
    wheels 3.10 "$work/wheels310" tensorrt==8.6.0 onnx-ir sympy mpmath ml-dtypes packaging rich pygments \
      $(sed 's/#.*//' "$shared/py310.txt")
    for wheel in "$work"/wheels310/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
    [ -e "$work/resource.xz" ] || { xz -T0 -9 -c "$site/tensorrt/$resource" > "$work/resource.tmp" && mv "$work/resource.tmp" "$work/resource.xz"; }
    rm -f "$site/tensorrt/$resource"
    tar -C "$work/trt" -cf - . | xz -T0 -6 > "$work/trt.xz"
    ;;
  ort)
    mkdir -p "$work/ort/site312"
    wheels 3.12 "$work/wheels312" onnxruntime-gpu==1.31.1 flatbuffers nvidia-ml-py
    for wheel in "$work"/wheels312/*.whl; do python3 -m zipfile -e "$wheel" "$work/ort/site312"; done
    tar -C "$work/ort" -cf - . | xz -T0 -6 > "$work/ort.xz"
    ;;
  data | sketch)
    for preset in "$@"; do
      if [ "$what" = sketch ]; then
        .venv/bin/python benchmarks/skeleton.py sketch "$preset" "$work/data/$preset"
        continue
      fi
      made=$work/exported/$preset
      .venv/bin/vlmc export "$preset" --random-weights --cases 1 -o "$made"
      .venv/bin/vlmc calibrate "$made" --recipe int8 --observer minmax --limit 1
      .venv/bin/python benchmarks/skeleton.py strip "$made" "$work/data/$preset"
      rm -r "$made"
    done
    tar -C "$work" -cf - data | xz -T0 -6 > "$work/data.xz"
    ;;
  parts)
    rm -rf .gpu/part-* "$work"/*.part.* && mkdir -p .gpu
    for name in trt ort data; do [ ! -e "$work/$name.xz" ] || split -b $part -d "$work/$name.xz" "$work/$name.part."; done
    split -b $part -d "$work/resource.xz" "$work/res.xz."
    number=0
    for file in "$work"/*.part.* "$work"/res.xz.*; do
      folder=.gpu/part-$(printf %02d "$number")
      mkdir -p "$folder" && mv "$file" "$folder/" && cp "$shared/unpack.sh" "$folder/"
      number=$((number + 1))
    done
    du -sh .gpu/part-*
    ;;
esac
