#!/usr/bin/env bash
# TensorRT 8.6 against PyTorch on the GPU host of shared/gpu/README.md: run there, in this order, in the repository.
#
#   tensorrt_host.sh start      unpacks, builds the demo's engines and asks a question; the rest builds on behind
#   tensorrt_host.sh measure    verdicts, profiles, the forms of tensorrt_variants.py; results under $OUT
#
# /tmp/gpu/data holds what was packed: demo (an artefact), 256m and vit2 (skeleton.py's).
set -u
data=/tmp/gpu/data logs=/tmp/gpu/logs
mkdir -p $logs
start() {
  resource=$(mktemp)
  cat /tmp/gpu/parts/res.xz.* | xz -dc -T0 > "$resource" & # by far the largest library, packed on its own
  bash /tmp/gpu/parts/unpack.sh all
  wait && mv "$resource" /tmp/gpu/py310/lib/python3.10/site-packages/tensorrt/libnvinfer_builder_resource.so.8.6.0
  ln -sfn "$PWD" /tmp/gpu/vlmc
  printf '#!/bin/sh\nunset PYTHONHOME LD_LIBRARY_PATH\nexport PYTHONPATH=/tmp/gpu\nexec %s "$@"\n' "$(command -v python3)" > /tmp/gpu/torch-python
  chmod +x /tmp/gpu/torch-python
}
[ "$1" = start ] && [ -e /tmp/gpu/parts/res.xz.00 ] && start && rm -f /tmp/gpu/parts/res.xz.*
. /tmp/gpu/env.sh
export PY310PATH=/tmp/gpu CUDA_MODULE_LOADING=LAZY PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/gpu/inductor COLUMNS=100
vlmc() { py310 -m vlmc "$@"; }
engine() { # ARTEFACT COMPONENT PRECISION [BACKEND]: built ahead, so that several are at once
  py310 -c 'import sys; from pathlib import Path; from vlmc.artifact import Artifact; from vlmc.engines.candidate import *
build(Artifact(Path(sys.argv[1])), Candidate("h100", sys.argv[2], (sys.argv[4:] or ["tensorrt"])[0], sys.argv[3]))' "$@" > "$logs/$(basename "$1")-$2-$3.log" 2>&1 ||
    { echo "FAILED $*"; tail -3 "$logs/$(basename "$1")-$2-$3.log"; }
}
behind() { # the true size and the forms, while the demo is looked at
  python3 benchmarks/skeleton.py fill $data/256m
  for part in vision_encoder decoder; do for p in fp16 int8; do engine $data/256m $part $p & done; done
  python3 benchmarks/skeleton.py fill $data/vit2
  for name in fp16-convolution fp16 int8 fp16-merged-qkv int8-merged-qkv int8-mlp int8-erf fp16-typed int8-typed int8-level-5; do
    timeout 90 bash -c "py310 benchmarks/tensorrt_variants.py build $data/vit2 $name" > $logs/vit2-$name.log 2>&1
  done &
  /tmp/gpu/torch-python benchmarks/tensorrt_warm.py $data/256m $data/demo > $logs/warm.log 2>&1 &
  wait
  touch /tmp/gpu/behind.done
}
export -f engine behind
export data logs
case $1 in
  start)
    date +%T
    for part in vision_encoder decoder; do for p in fp16 int8; do engine $data/demo $part $p & done; done
    engine $data/demo embed_tokens fp32 numpy
    wait; date +%T
    PYTHONPATH=/tmp/gpu setsid nohup bash -c behind > $logs/behind.log 2>&1 &
    py310 -c 'import sys; from pathlib import Path; from vlmc.artifact import Artifact; from vlmc.engines.trial import try_component
for part in ("vision_encoder", "decoder"):  # right or wrong; the times are those of a busy GPU and are not kept
    print(part, try_component(Artifact(Path(sys.argv[1])), "h100", part, ["tensorrt-fp16", "tensorrt-int8"], "numpy-fp32"))' $data/demo 2>&1 | tail -8
    date +%T
    ;;
  measure)
    limit=${2:-300}; begin=$SECONDS
    until [ -e /tmp/gpu/behind.done ] || [ $((SECONDS - begin)) -gt "$((limit / 2))" ]; do sleep 1; done
    date +%T; ls /tmp/gpu/behind.done; cat $logs/behind.log; tail -n 2 $logs/*.log | cut -c1-300 | tail -60
    left() { echo $((limit - (SECONDS - begin))); }
    timeout "$(left)" bash -c "py310 benchmarks/tensorrt_variants.py time $data/vit2" | tee "$OUT/vit2.json"; date +%T
    for name in 256m demo; do timeout "$(left)" bash -c "py310 -m vlmc build $data/$name --device h100 --int8" 2>&1; date +%T; done
    timeout "$(left)" bash -c "py310 -m vlmc run $data/demo $data/demo/golden/00.png --device h100 --prompt 'Describe the picture briefly.'" 2>&1
    timeout "$(left)" bash -c "py310 -m vlmc profile $data/256m --device h100 --runs 12 --tokens 64 --torch-python /tmp/gpu/torch-python" 2>&1 | tail -60; date +%T
    timeout "$(left)" bash -c "py310 -m vlmc profile $data/demo --device h100 --runs 12 --samples 24 --torch-python /tmp/gpu/torch-python" 2>&1 | tail -60; date +%T
    nvidia-smi -q -d CLOCK,PERFORMANCE,POWER | head -80 > $logs/smi.txt
    (cd $data && tar czf "$OUT/results.tar.gz" --exclude='*.trt' --exclude='*.npy' --exclude=examples --exclude=timing.cache \
      demo/engines 256m/engines demo/profile/h100 256m/profile/h100 $logs 2>/dev/null)
    cp $data/*/engines/h100/timing.cache "$OUT" 2>/dev/null | true
    ls -la "$OUT"
    ;;
esac
