#!/usr/bin/env bash
# On the GPU host, in the repository, after the last part of gpu_pack.sh: unpacks all under /tmp/gpu and makes the two
# interpreters, /tmp/gpu/tensorrt-python (3.10, TensorRT 8.6) and /tmp/gpu/torch-python (the host's, with PyTorch and
# onnxruntime-gpu). vlmc is importable in both.
set -eu
resource=$(mktemp -p /tmp)
cat /tmp/gpu/parts/res.xz.* | xz -dc -T0 > "$resource" & # by far the largest library, packed on its own
bash /tmp/gpu/parts/unpack.sh all
wait && mv "$resource" /tmp/gpu/py310/lib/python3.10/site-packages/tensorrt/libnvinfer_builder_resource.so.8.6.0
rm -f /tmp/gpu/parts/res.xz.* /tmp/gpu/parts/*.part.*
ln -sfn "$PWD" /tmp/gpu/vlmc
cat > /tmp/gpu/torch-python <<END
#!/usr/bin/env bash
unset PYTHONHOME PYTHONPATH
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
. /tmp/gpu/env.sh
export PYTHONPATH=/tmp/gpu\${PYTHONPATH:+:\$PYTHONPATH} PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/gpu/inductor
exec $(command -v python3) "\$@"
END
cat > /tmp/gpu/tensorrt-python <<'END'
#!/usr/bin/env bash
site=/tmp/gpu/py310/lib/python3.10/site-packages/tensorrt
export PYTHONHOME=/tmp/gpu/py310 PYTHONPATH=/tmp/gpu LD_LIBRARY_PATH=/tmp/gpu/py310/lib:$site:/usr/local/cuda/lib64
export CUDA_MODULE_LOADING=LAZY PYTHONUNBUFFERED=1
exec /tmp/gpu/py310/bin/python3.10 "$@"
END
chmod +x /tmp/gpu/*-python
