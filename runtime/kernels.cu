// What a decode step does on the GPU beside the engine. Compiled to kernels.ptx (kernels.py says how), which the driver
// compiles for its own GPU: so neither nvcc nor NVRTC is needed on the device.

typedef unsigned long long u64;

// Copies each state's new keys or values (heads, length, dim) to `position` of its cache (heads, capacity, dim).
// states: pairs of addresses (new, cache). A row is `words` 4-byte words of one position and head.
// Grid (states, heads).
extern "C" __global__ void append(const u64 *states, u64 position, u64 length, u64 words, u64 capacity) {
  const unsigned *source = (const unsigned *)states[2 * blockIdx.x];
  unsigned *cache = (unsigned *)states[2 * blockIdx.x + 1];
  const u64 count = length * words;
  source += blockIdx.y * count;
  cache += (blockIdx.y * capacity + *(const int *)position) * words;
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) cache[i] = source[i];
}

// The chosen token becomes the next input and is kept for the host; the position moves on by `length`.
// state: int32 [position, input token, tokens kept], 64 apart, since TensorRT wants its tensors aligned to 256 bytes.
extern "C" __global__ void advance(u64 state_address, u64 chosen, u64 history, u64 length) {
  int *state = (int *)state_address;
  const int token = *(const int *)chosen;
  state[0] += (int)length;
  state[64] = token;
  ((int *)history)[state[128]++] = token;
}
